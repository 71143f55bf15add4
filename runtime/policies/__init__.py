"""How large a tree is worth verifying, by measured costs."""
