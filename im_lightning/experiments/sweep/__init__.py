"""wandb sweep files, run without a server."""
