"""The model whose words count: what an engine for it must do, and a folder for each engine."""
