"""Scores: classification, nearest neighbours."""
