"""`make demo`: __main__.py runs the parts, report.py writes the report."""
