"""Schemas, recipes and overrides: everything a user can set, validated once."""
