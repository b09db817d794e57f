"""One self-contained HTML page of pool, rule, runs, weights, examples and comparison."""
