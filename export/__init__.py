"""Checkpoint -> frozen artifact: everything that needs torch. The runtime imports nothing from here."""
