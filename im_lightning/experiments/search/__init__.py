"""The search for the number of rows."""
