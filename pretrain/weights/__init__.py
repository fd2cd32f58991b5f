"""Reads weights at any address: `open_weights` in source.py."""
