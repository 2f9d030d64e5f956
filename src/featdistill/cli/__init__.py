"""The command line: names to schemas to tasks."""
