"""Lossless tree decoding."""
