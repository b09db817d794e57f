"""Experiments on top of single runs: compare, search, sweep, demo."""
