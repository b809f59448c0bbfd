"""Ranks: launchers, clusters, messages between ranks, and sharded teachers."""
