"""Ranks: rendezvous, and resuming on another number of them."""
