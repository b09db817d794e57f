"""Which runs: designed subsets from which a rule can be told."""
