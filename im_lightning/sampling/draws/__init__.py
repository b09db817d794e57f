"""In which order: weighted draws, the sampler and the resumable loader."""
