"""Answers to an evaluation set, of a model behind an endpoint or of one here, and how they compare."""
