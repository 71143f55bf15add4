"""Who guesses: draft models, whose calls texts share, and matches in the text."""
