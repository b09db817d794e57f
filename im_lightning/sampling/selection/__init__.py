"""Which rows: subsets by several methods."""
