"""Decoding loop of SPEED (arXiv 2310.12072): a pipeline over the loops of a shared decoder."""
