"""Ranks: launchers, clusters, messages and sharded teachers."""
