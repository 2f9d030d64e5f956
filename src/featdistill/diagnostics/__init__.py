"""Pure measurements on models."""
