"""Lossless decoding with draft trees."""
