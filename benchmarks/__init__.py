"""Benchmarks against peer tools, measured in the same run: `make bench`."""
