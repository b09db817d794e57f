"""Arms of rows at equal tokens and steps, and their comparison."""
