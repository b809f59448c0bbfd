"""Ranks and launchers."""
