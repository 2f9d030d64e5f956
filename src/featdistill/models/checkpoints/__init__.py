"""Checkpoint files: read as data, recognised by their keys, converted by explicit tables."""
