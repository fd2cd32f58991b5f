"""Benchmarks beside peers, both in one run: `make bench`."""
