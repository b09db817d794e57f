"""From a rule to weights, from weights to rows, from rows to resumable batches."""
