"""Inputs with different vocabularies: align.py decides what happens to them, remapped_source.py reads their rows."""
