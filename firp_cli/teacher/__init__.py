"""The frozen language model, layer by layer."""
