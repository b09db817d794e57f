"""Synthetic tasks of known quality, and the small models that the method needs."""
