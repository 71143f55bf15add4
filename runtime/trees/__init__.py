"""Token trees, which part of one is accepted, and what a target has verified of a text."""
