"""Filling a hidden-state store."""
