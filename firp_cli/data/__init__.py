"""Data sets, conversation formats and chat templates."""
