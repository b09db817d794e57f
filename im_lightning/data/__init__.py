"""Floor 1: examples, formats, templates, and the table that scores are kept in."""
