"""Turns the bytes of one sample into pixels (decode.py, augment.py) and tokens (captions.py, tokenizers.py)."""
