"""Backbones behind one contract, students, classifiers, and how they are loaded and exported."""
