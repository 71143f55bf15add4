"""Drafts: their kinds, their layouts on disk, their ONNX graph."""
