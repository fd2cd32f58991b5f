"""Held-out evaluation of a model: zero-shot classification, and negative log-likelihood per token."""
