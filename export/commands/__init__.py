"""The `dovetail-export` command."""
