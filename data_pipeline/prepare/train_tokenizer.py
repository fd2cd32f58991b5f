"""Trains a small byte-level BPE tokenizer, in the files that transformers and tokenizers load."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from data_pipeline import storage
from data_pipeline.errors import UserError

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
SPECIALS = (PAD, START, END)
BYTES = 256


def train_tokenizer(
    texts: Iterable[str], folder: str, vocabulary: int = 2048, max_tokens: int = 1_000_000
) -> None:
    """Train on `texts` and write tokenizer.json and tokenizer_config.json into `folder`.

    Ids: pad 0, start 1, end 2, then the 256 bytes, then the merges; so every text can be encoded. `encode` with special
    tokens gives start + text + end. The same texts give the same files. `max_tokens` is written to the config as
    model_max_length. Raises UserError if the text is too short for the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocabulary < BYTES + len(SPECIALS):
        raise UserError(
            f"a byte-level vocabulary needs at least {BYTES + len(SPECIALS)} entries; {vocabulary} were requested"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learnt = tokenizer.get_vocab_size()
    if learnt != vocabulary:
        raise UserError(
            f"the text is enough for {learnt} tokens, not {vocabulary}; add more text or choose a smaller vocabulary"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} {START} $B:1 {END}:1",
        special_tokens=[(START, SPECIALS.index(START)), (END, SPECIALS.index(END))],
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
    }
    storage.publish(os.path.join(folder, "tokenizer_config.json"), json.dumps(config, indent=2).encode())
    storage.publish(os.path.join(folder, "tokenizer.json"), tokenizer.to_str(pretty=True).encode())
