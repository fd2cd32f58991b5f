"""Recipes: load.py reads and checks a file, schema.py, sections/ and kinds/ document every key."""

# Version of the recipes in resolved.yaml. 1: kinds flip and sphinx. 2: kinds contrastive and generative.
SCHEMA = 2
