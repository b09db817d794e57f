"""Floor 1: checkpoints, token batches, and the one likelihood function."""
