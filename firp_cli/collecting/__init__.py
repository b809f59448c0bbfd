"""Collecting hidden states and answers into a store."""
