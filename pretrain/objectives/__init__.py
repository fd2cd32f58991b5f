"""Training objectives: base.py defines the interface; contrastive.py and generative.py implement it."""
