"""Computes which sample is in which row of which step: `StreamOrder` in stream_order.py. Reads no data."""
