"""The `firp` program: one file per command."""
