"""Measures a host and a pair of models. Reads the runtime; never torch."""
