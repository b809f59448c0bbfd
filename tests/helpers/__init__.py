"""Shared helpers of the tests: models, stores, commands, ranks."""
