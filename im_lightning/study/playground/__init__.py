"""A small made-up world: a pool of known quality and the small models that the method needs. No result about LLaMA."""
