"""Dovetail beside other engines."""
