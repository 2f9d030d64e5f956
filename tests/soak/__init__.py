"""A long run in which nothing may grow."""
