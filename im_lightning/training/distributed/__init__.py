"""Ranks: rendezvous, token means, resuming on another number of them, random state."""
