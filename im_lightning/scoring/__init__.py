"""Turns examples into a table of indicators, and keeps every value it ever computed."""
