"""Prepares text for training: pack.py writes rows of tokens as tars, train_tokenizer.py trains a tokenizer."""
