"""How well a target predicts given text, what is held out for that, and how much a text repeats itself."""
