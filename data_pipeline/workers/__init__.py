"""Builds batches in other processes, threads or Ray actors; pool.py defines the interface of all pools.

process_pool.py replaces dead and stalled workers; watchdog.py detects stalls; isolation.py finds the sample that
crashes the decoder.
"""
