"""Natural-language indicators of instruction quality, one file per family, and their transforms φ."""
