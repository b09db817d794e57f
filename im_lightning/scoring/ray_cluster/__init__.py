"""Scoring on a Ray cluster: the engine on the driver, the worker on each node."""
