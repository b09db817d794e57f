"""A model behind an OpenAI-compatible endpoint: asked at a known cost, every answer kept with its request."""
