"""The report: one self-contained HTML page of a pool, its rule, the runs, the weights and a comparison."""
