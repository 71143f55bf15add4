"""Token trees, and which part of one is accepted."""
