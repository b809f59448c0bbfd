"""Conversations, prompts and the hidden-state store."""
