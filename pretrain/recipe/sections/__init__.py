"""Sections of a recipe with a file of their own: data and its text formats, model, evaluation."""
