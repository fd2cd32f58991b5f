"""A second trainer, written from papers and documented contracts, that shares no code with the packages.

Tests compare training runs with it: it reads the recipe's YAML file and the tars, trains in one process in float64, and
returns what metrics.jsonl and the checkpoint of a run should contain.

    draws.py      random choices of a row, in plain integers
    rows.py       rows of a stream: order, replacement, crop, tokens, digests
    towers.py     vision and text transformer
    flip.py       FLIP: contrastive loss, zero-shot accuracy
    sphinx.py     SPHINX: next-token loss, held-out NLL
    training.py   schedule, clipping, AdamW, the loop
    weights.py    initial weights; weights and moments of a DeepSpeed checkpoint

tests/test_imports.py checks that nothing here imports the packages.
"""
