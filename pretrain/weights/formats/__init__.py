"""Readers of the file formats of weights, one file each; `open_weights` (source.py) chooses the reader."""
