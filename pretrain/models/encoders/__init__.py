"""Vision encoders of language models. `pretrain/build/encoders.py` builds them from a recipe's `model.vision`."""
