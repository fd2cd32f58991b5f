"""Writes merges: writer.py executes plans and passes the bytes to local.py (folder) or remote.py (object store)."""
