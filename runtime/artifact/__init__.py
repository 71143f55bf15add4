"""Reading an artifact, strictly."""
