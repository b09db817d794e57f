"""Measurements of this package; not part of the wheel."""
