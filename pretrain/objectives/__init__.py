"""Training objectives: base.py defines the interface; flip.py and sphinx.py implement it."""
