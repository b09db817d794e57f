"""Do the rankings of a small base's runs carry over to another base? The same subsets, finetuned on both."""
