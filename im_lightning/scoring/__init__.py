"""Floor 2: turns examples into a table of indicators, and keeps every value it ever computed."""
