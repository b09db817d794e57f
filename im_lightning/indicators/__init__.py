"""Floor 1: natural-language indicators of instruction quality, one file per family."""
