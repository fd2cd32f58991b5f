"""Packing against a brute force of three lines; the trained tokenizer against the transformers library."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import webdataset

from data_pipeline.errors import UserError
from data_pipeline.formats import refinedweb
from data_pipeline.prepare.pack import pack
from data_pipeline.prepare.train_tokenizer import train_tokenizer
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.transforms.tokenizers import load_tokenizer

WORDS = [
    "a",
    "handwritten",
    "digit",
    "small",
    "large",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "left",
    "right",
    "of",
    "the",
    "on",
    "background",
]
TEXTS = [" ".join(WORDS[(i * j + j) % len(WORDS)] for j in range(5 + i % 17)) + "." for i in range(60)]
VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer(TEXTS, folder, VOCABULARY)
    return folder


@pytest.fixture
def documents(tmp_path: Path) -> str:
    """Two files of documents; one document is empty, one is only spaces."""
    folder = tmp_path / "documents"
    texts = [*TEXTS[:10], "", *TEXTS[10:30], "  \n"]
    listed = [refinedweb.Document(text, f"u{n}") for n, text in enumerate(texts)]
    refinedweb.write_documents(str(folder / "0.parquet"), listed[:13])
    refinedweb.write_documents(str(folder / "1.parquet"), listed[13:])
    return str(folder)


def brute_force(tokenizer: str) -> list[int]:
    """All tokens of the documents, end to end, by the tokenizers library alone."""
    inner = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    return [i for text in TEXTS[:30] for i in [1, *inner.encode(text, add_special_tokens=False).ids, 2]]


def rows_of(folder: Path) -> list[np.ndarray]:
    manifest = open_source("text", str(folder))
    reader = ShardReader(manifest)
    places = [(s, i) for s, count in enumerate(manifest.counts) for i in range(count)]
    return [np.load(io.BytesIO(reader.read(*place)[1]["npy"]), allow_pickle=False) for place in places]


@pytest.mark.parametrize("length", [2, 7, 64])
def test_rows_are_the_documents_end_to_end(
    tmp_path: Path, documents: str, tokenizer: str, length: int
) -> None:
    summary = pack(documents, str(tmp_path / "out"), tokenizer, length, rows_per_shard=10)
    tokens = brute_force(tokenizer)
    rows = rows_of(tmp_path / "out")
    assert {row.dtype for row in rows} == {np.dtype(np.uint16)}
    assert {row.shape for row in rows} == {(length,)}
    assert np.concatenate(rows).tolist() == tokens[: len(tokens) // length * length]
    assert (summary.rows, summary.tail_tokens, summary.tokens) == (*divmod(len(tokens), length), len(tokens))
    assert (summary.documents, summary.empty_documents, summary.shards) == (30, 2, -(-len(rows) // 10))
    assert summary.characters == sum(map(len, TEXTS[:30]))
    assert json.loads((tmp_path / "out" / "packed.json").read_bytes()) == summary.__dict__


def test_each_row_says_which_documents_it_holds(tmp_path: Path, documents: str, tokenizer: str) -> None:
    pack(documents, str(tmp_path / "out"), tokenizer, 16)
    lengths: dict[str, int] = {}
    for sample in webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False):
        row = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        parts = json.loads(sample["json"])["documents"]
        assert sum(p["tokens"] for p in parts) == 16
        for part in parts:
            # A part is a document's beginning exactly where a start token stands.
            assert (row[part["start"]] == 1) == (part["url"] not in lengths)
            lengths[part["url"]] = lengths.get(part["url"], 0) + part["tokens"]
    inner = load_tokenizer(tokenizer)
    truth = {f"u{n}": len(inner.encode(text)) + 2 for n, text in enumerate(TEXTS[:10])}
    assert {url: lengths[url] for url in truth} == truth


def test_statistics_and_fingerprint(tmp_path: Path, documents: str, tokenizer: str) -> None:
    pack(documents, str(tmp_path / "out"), tokenizer, 16, rows_per_shard=8)
    manifest = open_source("text", str(tmp_path / "out"))
    assert manifest.counted_by == "stats"
    assert manifest.tokenizer == load_tokenizer(tokenizer).fingerprint
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_bytes())
    assert (stats["successes"], stats["tokens"], stats["length"], stats["vocabulary"]) == (
        8,
        128,
        16,
        VOCABULARY,
    )


def test_the_same_documents_give_the_same_bytes(tmp_path: Path, documents: str, tokenizer: str) -> None:
    for name in ("a", "b"):
        pack(documents, str(tmp_path / name), tokenizer, 16, rows_per_shard=8)
    files = sorted(os.listdir(tmp_path / "a"))
    assert files == sorted(os.listdir(tmp_path / "b"))
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [
        (tmp_path / "b" / f).read_bytes() for f in files
    ]


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, documents: str, tokenizer: str) -> None:
    state = json.loads((Path(tokenizer) / "tokenizer.json").read_bytes())
    extra = {f"<extra{n}>": VOCABULARY + n for n in range(70_000)}
    state["model"]["vocab"].update(extra)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    summary = pack(documents, str(tmp_path / "out"), str(tmp_path / "tokenizer.json"), 16)
    assert summary.dtype == "uint32"
    assert {row.dtype for row in rows_of(tmp_path / "out")} == {np.dtype(np.uint32)}


def test_mistakes_are_named(tmp_path: Path, documents: str, tokenizer: str) -> None:
    with pytest.raises(UserError, match=r"tokens, fewer than one row of 100000"):
        pack(documents, str(tmp_path / "out"), tokenizer, 100_000)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is 1; it must be at least 2 tokens"):
        pack(documents, str(tmp_path / "out"), tokenizer, 1)
    pack(documents, str(tmp_path / "out"), tokenizer, 16)
    with pytest.raises(UserError, match="has 1 tars already"):
        pack(documents, str(tmp_path / "out"), tokenizer, 16)
    with pytest.raises(UserError, match=r"no tokenizer\.json found"):
        pack(documents, str(tmp_path / "new"), str(tmp_path), 16)


def test_transformers_loads_the_tokenizer(tokenizer: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra train)")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ours = load_tokenizer(tokenizer)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert (ours.pad_id, ours.start_id, ours.end_id) == (0, 1, 2)
    assert len(theirs) == ours.vocab_size == VOCABULARY
    for text in [*TEXTS, "grüße, 日本語 \x00 <|end|?", "  two  spaces\n\ttab "]:
        assert theirs(text)["input_ids"] == [1, *ours.encode(text), 2]
        assert ours.decode(ours.encode(text)) == text
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text


def test_training_a_tokenizer_in_another_process_gives_the_same_file(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    code = (
        "import sys; from pathlib import Path; from data_pipeline.prepare.train_tokenizer import train_tokenizer;"
        f"train_tokenizer(Path(sys.argv[1]).read_text().split(chr(10)), sys.argv[2], {VOCABULARY})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "texts", tmp_path], check=True, env=environment)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        digests = {hashlib.sha256((Path(f) / name).read_bytes()).hexdigest() for f in (tokenizer, tmp_path)}
        assert len(digests) == 1, name


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"enough for \d+ tokens, not 2048"):
        train_tokenizer(["a red circle"], str(tmp_path), 2048)
    with pytest.raises(UserError, match="at least 259"):
        train_tokenizer(["a red circle"], str(tmp_path), 200)
    assert list(tmp_path.iterdir()) == []
