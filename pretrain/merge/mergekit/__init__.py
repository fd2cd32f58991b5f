"""Merges that mergekit files describe: yaml_file.py reads a file, plan.py plans it."""
