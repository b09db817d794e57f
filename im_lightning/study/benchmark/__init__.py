"""The benchmark: ratios measured side by side in one run. `rows_*.py` hold the measurements, a file per subject."""
