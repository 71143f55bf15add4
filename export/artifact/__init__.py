"""Writing an artifact and checking it."""
