"""Tokens that only the settings of a tokenizer name: with a row after every vocabulary rule, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.merge import merge, plan
from pretrain.merge.verify.check_output import verify
from tests.support.merge_inputs import floats, write

ADDED = ("<|im_start|>", "<|im_end|>")
RULES = ("first", "intersect", "union", "pad")


def model(folder: Path, seed: int, added: tuple[str, ...], rows: int | None = None, **settings: Any) -> str:
    """A folder with a word-level tokenizer of 6 words and `added` tokens, and an embedding of as many rows."""
    words = {f"w{i}": i for i in range(6)}
    entries = [
        {"id": 6 + i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, token in enumerate(added)
    ]  # fmt: skip
    rows = rows if rows is not None else 6 + len(added)
    write(
        folder,
        {"model.embed_tokens.weight": floats(seed, rows, 4), "lm_head.weight": floats(seed + 1, rows, 4)},
    )
    content = {
        "version": "1.0", "added_tokens": entries, "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shape = {"vocab_size": rows, "hidden_size": 4, "model_type": "llama", "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def loaded_size(folder: Path) -> int:
    transformers = pytest.importorskip("transformers")
    return len(transformers.PreTrainedTokenizerFast.from_pretrained(folder))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "settings",
    [
        {"extra_special_tokens": list(ADDED)},
        {"additional_special_tokens": list(ADDED)},
        {"extra_special_tokens": {"start": ADDED[0], "end": {"content": ADDED[1], "__type": "AddedToken"}}},
        {"eos_token": ADDED[1], "extra_special_tokens": [ADDED[0]]},
        {"eos_token": {"content": ADDED[1], "lstrip": False}},
        {"added_tokens_decoder": {"6": {"content": ADDED[0]}, "7": {"content": ADDED[1]}}},
    ],
    ids=["extra", "additional", "extra_map", "eos", "eos_object", "decoder"],
)
@pytest.mark.parametrize("first", ["chat", "base"])
def test_every_token_has_a_row(tmp_path: Path, rule: str, settings: dict[str, Any], first: str) -> None:
    inputs = [model(tmp_path / "chat", 0, ADDED, **settings), model(tmp_path / "base", 5, ())]
    inputs = inputs if first == "chat" else inputs[::-1]
    if rule == "intersect" and "eos_token" in settings and first == "chat":
        with pytest.raises(
            UserError, match=r"eos_token is '<.im_end.>', which the merged vocabulary does not have"
        ):
            merge(inputs, tmp_path / "out", beta=0.5, vocabulary=rule)
        return
    merge(inputs, tmp_path / "out", beta=0.5, vocabulary=rule)
    rows = json.loads((tmp_path / "out/config.json").read_text())["vocab_size"]
    if isinstance(settings.get("extra_special_tokens"), list) or "additional_special_tokens" in settings:
        assert loaded_size(tmp_path / "out") <= rows
    report = verify(tmp_path / "out")
    assert not report.wrong, report.lines()
    named = (tmp_path / "out/tokenizer_config.json").read_text()
    ids = (tmp_path / "out/tokenizer.json").read_text()
    assert all(token in ids for token in ADDED if token in named)


def test_verify_finds_tokens_without_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output of an earlier version, which kept the settings of the chat model."""
    settings = {"extra_special_tokens": list(ADDED)}
    inputs = [model(tmp_path / "chat", 0, ADDED, **settings), model(tmp_path / "base", 5, ())]
    monkeypatch.setattr(
        "pretrain.merge.vocabulary.tokenizer_json.without_missing", lambda companions, *_: dict(companions)
    )
    monkeypatch.setattr("pretrain.merge.planning.assemble.tokens_without_rows", lambda *_: None)
    merge(inputs, tmp_path / "out", beta=0.5, vocabulary="intersect")
    report = verify(tmp_path / "out")
    assert any(
        "without a row" in f.text and "im_start" in f.text for f in report.findings if f.level == "wrong"
    )


def test_a_flaw_that_all_inputs_have_is_a_note(tmp_path: Path) -> None:
    inputs = [model(tmp_path / name, seed, ADDED, rows=6) for seed, name in enumerate("ab")]
    assert any("without a row" in note for note in plan(inputs, beta=0.5).notes)
    merge(inputs, tmp_path / "out", beta=0.5)
    report = verify(tmp_path / "out")
    assert not report.wrong
    assert any("without a row" in f.text for f in report.findings if f.level == "note")


def test_rows_beyond_the_tokens_are_padding(tmp_path: Path) -> None:
    inputs = [
        model(tmp_path / n, s, (), rows=8, extra_special_tokens=list(ADDED)) for s, n in enumerate("ab")
    ]
    assert not any("without a row" in note for note in plan(inputs, beta=0.5).notes)
