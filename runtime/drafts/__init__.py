"""Who guesses: draft models, matches in the text."""
