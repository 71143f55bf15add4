"""How large a tree is worth verifying: measured prices, chances of acceptance, and what a text has taught."""
