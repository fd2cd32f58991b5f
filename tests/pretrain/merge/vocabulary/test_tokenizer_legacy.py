"""Tokenizers without tokenizer.json: the same ids as in the libraries that wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_pipeline.errors import UserError
from pretrain.merge import merge, open_weights
from pretrain.merge.vocabulary.align import aligned
from pretrain.merge.vocabulary.tokenizer_json import read_tokenizer
from pretrain.merge.vocabulary.tokenizer_legacy import read_ids
from tests.pretrain.merge.vocabulary.test_align import bpe, model, word_level

# Trained by sentencepiece 0.2.3, which also listed its pieces in the .json file of the same name.
FIXTURE = Path(__file__).with_name("sentencepiece.model")


def test_sentencepiece_as_its_own_library_reads_it() -> None:
    pieces = json.loads(FIXTURE.with_suffix(".json").read_text())
    assert len(pieces) > 20
    for name in ("tokenizer.model", "spiece.model"):
        assert read_ids({name: FIXTURE}, "x") == {piece: number for number, piece in enumerate(pieces)}


@pytest.mark.parametrize(
    "raw", [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff", b"\x0a\x02\x0a", b"\xff" * 30, b"\x0b"]
)
def test_what_is_no_sentencepiece_says_nothing(raw: bytes) -> None:
    assert read_ids({"tokenizer.model": raw}, "x") is None


def test_byte_pairs_as_transformers_read_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = bpe([("a", "b"), ("ab", "c")], ["<s>", "<a>"])
    made.model.save(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": made.get_vocab_size()}))
    slow = transformers.GPT2Tokenizer.from_pretrained(tmp_path, unk_token="a", bos_token="a", eos_token="a")
    found = read_ids({path.name: path for path in tmp_path.iterdir()}, "x")
    assert found is not None
    theirs = slow.get_vocab()
    assert {token: number for token, number in found.items() if token != "<new>"}.items() <= theirs.items()
    assert found["<new>"] == made.get_vocab_size()


def test_lines_and_added_tokens() -> None:
    config = {"added_tokens_decoder": {"3": {"content": "<x>"}, "1": {"content": "a"}, "x": {"content": "y"}}}
    found = {"vocab.txt": b"[PAD]\na\r\nb\n", "tokenizer_config.json": json.dumps(config).encode()}
    assert read_ids(found, "x") == {"[PAD]": 0, "a": 1, "b": 2, "<x>": 3}
    assert read_ids({"vocab.json": b'{"a": 1, "b": 1}'}, "x") is None
    assert read_ids({"vocab.json": b'["a"]'}, "x") is None
    assert read_ids({}, "x") is None
    with pytest.raises(UserError, match=r"x: vocab\.json: not valid JSON"):
        read_ids({"vocab.json": b"{"}, "x")


def older(folder: Path, tokenizer: Tokenizer) -> Path:
    """The same tokens in vocab.txt instead of tokenizer.json."""
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        (folder / name).unlink()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)  # type: ignore[arg-type]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


WORDS = ["[unk]", "sun", "moon", "sky"]


def test_rows_of_other_tokens_are_seen_without_a_tokenizer_json(tmp_path: Path) -> None:
    same, other = word_level(WORDS), word_level(["[unk]", "moon", "sun", "sky"])
    a = model(tmp_path / "a", same, 8, seed=1)
    alike = older(model(tmp_path / "b", same, 8, seed=2), same)
    sources = [open_weights(str(a)), open_weights(str(alike))]
    assert aligned(sources, None) == sources
    unlike = older(model(tmp_path / "c", other, 8, seed=3), other)
    with pytest.raises(UserError, match="the vocabularies differ"):
        merge([str(a), str(unlike)], tmp_path / "out", beta=0.5)
    views = aligned([open_weights(str(a)), open_weights(str(unlike))], "union")
    rows = open_weights(str(unlike)).array("lm_head.weight")
    np.testing.assert_array_equal(views[1].array("lm_head.weight")[:4], rows[[0, 2, 1, 3]])


def test_a_joint_tokenizer_needs_a_tokenizer_json_and_says_how(tmp_path: Path) -> None:
    made = [word_level(WORDS), word_level([*WORDS, "rain"])]
    folders = [older(model(tmp_path / str(i), t, 8, seed=i), t) for i, t in enumerate(made)]
    with pytest.raises(UserError, match=r"has no tokenizer\.json.*AutoTokenizer.*save_pretrained"):
        merge([str(folder) for folder in folders], tmp_path / "out", beta=0.5, vocabulary="union")
    shutil.rmtree(folders[1])
    bare = model(tmp_path / "bare", None, 9, seed=3)
    with pytest.raises(
        UserError, match=r"union works token by token and needs a tokenizer\.json .*transformers writes it"
    ):
        merge([str(folders[0]), str(bare)], tmp_path / "out", beta=0.5, vocabulary="union")


def test_a_tokenizer_json_goes_before_older_files(tmp_path: Path) -> None:
    made = word_level(WORDS)
    folder = model(tmp_path / "a", made, 8, seed=1)
    (folder / "vocab.txt").write_text("x\ny\n")
    found = read_tokenizer(open_weights(str(folder)).companions, "x")
    assert found is not None
    assert found.ids == made.get_vocab()
