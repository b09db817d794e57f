"""Checkpoints, token batches, scorer models, and the one likelihood function."""
