"""How a text is made, from its prompt to its last token."""
