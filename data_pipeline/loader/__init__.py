"""Gives a rank its micro-batches in order: loader.py builds them ahead of time, prefetcher.py fills the node cache."""
