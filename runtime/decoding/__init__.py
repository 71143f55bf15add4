"""How texts are made, several in one pass: the engine and its step, a text, its stream, its conversation."""
