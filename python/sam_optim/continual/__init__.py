"""Memories and losses of continual learning."""
