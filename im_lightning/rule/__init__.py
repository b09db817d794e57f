"""The rule from indicators to log evaluation loss: its fit, its file, its summary."""
