"""Examples, formats, templates, and the table that scores are kept in."""
