"""Builds the parts of a training stage from its recipe: objective.py the objective, streams.py the data streams."""
