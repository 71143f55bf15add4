"""The text of a tokenizer.json, made and proven."""
