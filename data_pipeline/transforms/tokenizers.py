"""Tokenizer protocol, CLIP's BPE and Hugging Face tokenizers, and caption to token row."""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from data_pipeline.errors import UserError

CLIP_BPE = "clip-bpe"
# Names of special tokens, in order of preference, for a tokenizer.json without a tokenizer_config.json.
COMMON_SPECIAL_TOKENS = {
    "start": (
        "<|start|>",
        "<s>",
        "<bos>",
        "<|begin_of_text|>",
        "<|startoftext|>",
        "<start_of_text>",
        "[CLS]",
    ),
    "end": ("<|end|>", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<end_of_text>", "[SEP]"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
}
CONFIG_FIELDS = {"start": "bos_token", "end": "eos_token", "pad": "pad_token"}


class Tokenizer(Protocol):
    """Tokenizer interface of the pipeline. Instances are picklable, so workers do not read the tokenizer's file."""

    vocab_size: int
    start_id: int
    end_id: int
    pad_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens; a special token's name inside the text is encoded as ordinary text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, without special tokens."""
        ...


class JsonTokenizer:
    """Tokenizer of a tokenizer.json, with the `tokenizers` library."""

    def __init__(self, text: str, start_id: int, end_id: int, pad_id: int) -> None:
        import tokenizers

        self._text = text
        self._inner = tokenizers.Tokenizer.from_str(text)
        self._inner.no_truncation()
        self._inner.no_padding()
        # The name of the end token in a caption from the web must not become an end token.
        self._inner.encode_special_tokens = True
        self.vocab_size: int = self._inner.get_vocab_size(with_added_tokens=True)
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.fingerprint = xxhash.xxh64_hexdigest(f"{start_id} {end_id} {pad_id}\n{text}".encode())

    def __reduce__(self) -> tuple[type[JsonTokenizer], tuple[str, int, int, int]]:
        return type(self), (self._text, self.start_id, self.end_id, self.pad_id)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)


class ClipTokenizer:
    """CLIP's byte-pair encoding with open_clip's vocabulary and text cleaning; imports neither open_clip nor torch."""

    vocab_size = 49408
    start_id = 49406
    end_id = 49407
    pad_id = 0

    def __init__(self) -> None:
        vocabulary = _open_clip_file("bpe_simple_vocab_16e6.txt.gz")
        self._inner = _clip_bpe(vocabulary)
        self.fingerprint = xxhash.xxh64_hexdigest(b"clip-bpe\n" + vocabulary)

    def __reduce__(self) -> tuple[type[ClipTokenizer], tuple[()]]:
        return ClipTokenizer, ()

    def encode(self, text: str) -> list[int]:
        # Cleaning is slower than encoding, and changes only text with `&` or characters outside printable ASCII.
        if text.isascii() and text.isprintable() and "&" not in text:
            cleaned = text
        else:
            import ftfy

            cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
        return self._inner.encode(" ".join(cleaned.split()).lower(), add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        kept = [int(i) for i in ids if int(i) not in (self.start_id, self.end_id)]
        return self._inner.decode(kept, skip_special_tokens=False).replace("</w>", " ").strip()


@lru_cache(maxsize=1)
def _clip_tokenizer() -> ClipTokenizer:
    return ClipTokenizer()


def load_tokenizer(name: str) -> Tokenizer:
    """Tokenizer by name: `clip-bpe`, a tokenizer.json, or a folder that contains one. Raises UserError."""
    if name == CLIP_BPE:
        return _clip_tokenizer()
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"text.tokenizer: {name}: no tokenizer.json found. Write `{CLIP_BPE}`, a tokenizer.json or its folder; "
            "`dromos data prepare configs/demo/flip.yaml` writes the demo's"
        )
    try:
        text = file.read_text(encoding="utf-8")
        vocabulary = _vocabulary(text)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"text.tokenizer: {file} is not a tokenizer.json: {error}") from error
    return JsonTokenizer(text, *_special_ids(file, vocabulary))


def caption_row(tokenizer: Tokenizer, caption: str, length: int) -> tuple[np.ndarray, int]:
    """Token row, int32 [length], and the number of its tokens that are not padding.

    The row is the start token, the caption (truncated to length - 2 tokens), the end token and padding.
    """
    ids = tokenizer.encode(caption)[: length - 2]
    row = np.full(length, tokenizer.pad_id, dtype=np.int32)
    used = len(ids) + 2
    row[:used] = [tokenizer.start_id, *ids, tokenizer.end_id]
    return row, used


def _vocabulary(text: str) -> dict[str, int]:
    import tokenizers

    return tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)


def _special_ids(file: Path, vocabulary: dict[str, int]) -> tuple[int, int, int]:
    """Ids of start, end and pad token: from tokenizer_config.json beside the file, else by common names.

    If there is no start token (GPT-2) or no pad token (usual with Llama), the end token is used. Raises UserError.
    """
    config_file = file.with_name("tokenizer_config.json")
    config = _config(config_file) if config_file.is_file() else {}
    ids: dict[str, int | None] = {}
    for role, field in CONFIG_FIELDS.items():
        named = config.get(field)
        named = named.get("content") if isinstance(named, dict) else named
        if named is not None and (not isinstance(named, str) or named not in vocabulary):
            raise UserError(f"{config_file}: {field} {named!r} is not in the vocabulary of {file}")
        names = (named,) if field in config else COMMON_SPECIAL_TOKENS[role]
        ids[role] = next((vocabulary[name] for name in names if name in vocabulary), None)
    end = ids["end"]
    if end is None:
        raise UserError(f"{file}: no end token; name it as eos_token in {config_file}")
    return (end if ids["start"] is None else ids["start"], end, end if ids["pad"] is None else ids["pad"])


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"text.tokenizer: {file} is not valid JSON: {error}; correct or remove it") from None
    if not isinstance(config, dict):
        raise UserError(
            f"text.tokenizer: {file} contains a {type(config).__name__}, not a JSON object; correct or remove it"
        )
    return config


def _open_clip_file(name: str) -> bytes:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "text.tokenizer: clip-bpe needs open_clip's vocabulary; install it: pip install 'dromos[train]'"
        )
    return (Path(next(iter(spec.submodule_search_locations))) / name).read_bytes()


def _clip_bpe(vocabulary_gz: bytes) -> Any:
    """open_clip's SimpleTokenizer, rebuilt with the `tokenizers` library: much faster, and without torch."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    lines = gzip.decompress(vocabulary_gz).decode("utf-8").split("\n")
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=merges, end_of_word_suffix="</w>"
    )
    tokenizer = tokenizers.Tokenizer(model)
    word_pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(word_pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> list[str]:
    """GPT-2's 256 printable characters that represent bytes, in the order of CLIP's vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]
