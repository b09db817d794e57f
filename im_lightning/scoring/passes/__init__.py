"""One pass over the pool per model: what it computes, in which batches."""
