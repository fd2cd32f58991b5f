"""Recipes: load.py reads and checks a file, schema.py and data.py document every key."""
