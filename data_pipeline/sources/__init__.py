"""Reads samples from the tars of one source: shard_reader.py returns a sample, manifest.py counts the samples."""
