"""Promises that are tested by killing what made them (docs/reliability.md)."""
