"""Losses as sums over rows; normalisation.py explains how they become means over the global batch."""
