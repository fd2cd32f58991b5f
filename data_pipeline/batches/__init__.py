"""Builds the batches of a stream: `BatchBuilder` in batch_builder.py makes any rows of any step."""
