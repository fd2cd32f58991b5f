"""Recipes, models, training, evaluation and merging; docs/architecture.md explains the folders."""
