"""A checkpoint in the shape of a larger one, for benchmarks."""
