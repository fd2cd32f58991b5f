"""Held-out figures of a model: zero-shot classification and negative log-likelihood a token."""
