"""One file for each format that a model can be exported to; `models/export.py` chooses."""
