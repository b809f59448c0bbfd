"""Frozen language model, layer by layer."""
