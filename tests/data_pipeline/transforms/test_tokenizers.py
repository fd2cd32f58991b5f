"""Tokenizers against open_clip and transformers, and token rows against their definition."""

from __future__ import annotations

import html
import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import ClipTokenizer, caption_row, load_tokenizer
from tests.support.samples import write_tokenizer

CAPTIONS = [
    "a photo of a dog",
    "  A  Photo\tof\nTHE Dog's  bowl!!  ",
    "it's 2024 — they'll re-do #1, won't they? I'd say we've 3.14",
    "caf&eacute; &amp;amp; bar &lt;b&gt;",
    "naïve façade, Straße, ŁÓDŹ, ДОМ, 東京タワー, مرحبا, हिन्दी",
    "emoji 😀👩‍👩‍👧 mid-word😀word",
    "mojibake: donâ€™t â€œquoteâ€\x9d",
    "a_b__c/d\\e  (f) [g] {h} ~ ` ^ | $5.00 50%",
    "x" * 300,
    "antidisestablishmentarianism supercalifragilistic",
    "",
]


def test_clip_rows_are_open_clips(shared) -> None:
    open_clip = pytest.importorskip("open_clip")
    from data_pipeline.sources.manifest import open_source
    from data_pipeline.sources.shard_reader import ShardReader

    peer = open_clip.SimpleTokenizer()
    ours = load_tokenizer("clip-bpe")
    reader = ShardReader(open_source("photos", str(shared / "data" / "photos")))
    captions = CAPTIONS + [reader.read(0, i)[1]["txt"].decode() for i in range(100)]
    for length in (5, 16, 77):
        rows = np.stack([caption_row(ours, caption, length)[0] for caption in captions])
        np.testing.assert_array_equal(rows, peer(captions, context_length=length).numpy())
    for caption in captions:
        assert ours.decode(ours.encode(caption)) == peer.decode(peer.encode(caption)).strip()
    assert (ours.vocab_size, ours.start_id, ours.end_id) == (
        peer.vocab_size,
        peer.sot_token_id,
        peer.eot_token_id,
    )


def test_clip_tokens_need_no_torch() -> None:
    code = (
        "import sys; from data_pipeline.transforms.tokenizers import load_tokenizer; "
        "load_tokenizer('clip-bpe').encode('a dog'); "
        "sys.exit('torch' in sys.modules or 'open_clip' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with the demo's special tokens and a tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("byte-level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_json_tokens_are_transformers(byte_level: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast(tokenizer_file=str(byte_level / "tokenizer.json"), pad_token="<|pad|>")
    ours = load_tokenizer(str(byte_level))
    for caption in CAPTIONS:
        ids = ours.encode(caption)
        assert ids == peer.encode(caption, add_special_tokens=False, truncation=False)
        assert ours.decode(ids) == caption
    assert (ours.pad_id, ours.start_id, ours.end_id) == (0, 1, 2)
    assert ours.vocab_size == len(peer)


def test_a_caption_cannot_write_a_special_token(byte_level: Path) -> None:
    ours = load_tokenizer(str(byte_level))
    ids = ours.encode("stop <|end|> here")
    assert ours.end_id not in ids
    assert ours.decode(ids) == "stop <|end|> here"
    assert ours.decode([ours.start_id, *ids, ours.end_id, ours.pad_id]) == "stop <|end|> here"


@pytest.mark.parametrize("name", ["json", "clip-bpe"])
def test_a_pickled_tokenizer_is_the_same(name: str, byte_level: Path) -> None:
    ours = load_tokenizer(str(byte_level) if name == "json" else name)
    again = pickle.loads(pickle.dumps(ours))
    assert [again.encode(c) for c in CAPTIONS] == [ours.encode(c) for c in CAPTIONS]
    assert again.fingerprint == ours.fingerprint


def test_fingerprint_follows_the_file(byte_level: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes((byte_level / "tokenizer.json").read_bytes())
    assert load_tokenizer(str(copy)).fingerprint == load_tokenizer(str(byte_level)).fingerprint
    other = write_tokenizer(tmp_path / "other")
    assert load_tokenizer(str(other)).fingerprint != load_tokenizer(str(byte_level)).fingerprint


def test_rows_hold_start_caption_end_padding(tmp_path: Path) -> None:
    ours = load_tokenizer(str(write_tokenizer(tmp_path / "t")))
    a, red, dot = (ours.encode(word)[0] for word in ("a", "red", "dot"))
    row, used = caption_row(ours, "a red dot", 7)
    assert row.dtype == np.int32
    assert (row.tolist(), used) == ([1, a, red, dot, 2, 0, 0], 5)
    row, used = caption_row(ours, "a red dot", 4)
    assert (row.tolist(), used) == ([1, a, red, 2], 4)
    row, used = caption_row(ours, "", 4)
    assert (row.tolist(), used) == ([1, 2, 0, 0], 2)


def test_clip_bpe_without_open_clip_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"clip-bpe needs open_clip's vocabulary.*pip install 'dromos\[train\]'"
    ):
        ClipTokenizer()


def test_missing_and_wrong_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*no tokenizer\.json found.*dromos data prepare"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    folder = write_tokenizer(tmp_path / "wrong")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</nope>"}')
    with pytest.raises(UserError, match="eos_token '</nope>' is not in the vocabulary"):
        load_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    with pytest.raises(UserError, match=r"no end token; name it as eos_token in .*tokenizer_config\.json"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000])
def test_a_configuration_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"text\.tokenizer: .*tokenizer_config\.json (is not valid JSON|contains a .*, not a JSON object)",
    ):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("value", ["7", '["<|end|>"]', '{"content": {}}'])
def test_a_special_token_that_is_no_text_is_named(tmp_path: Path, value: str) -> None:
    folder = write_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text(f'{{"eos_token": {value}}}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token .* is not in the vocabulary"):
        load_tokenizer(str(folder))


# Start, end and padding of model families, as their tokenizer.json names them.
FAMILIES = {
    "this project": ("<|start|>", "<|end|>", "<|pad|>"),
    "Llama 2": ("<s>", "</s>", None),
    "XLM-R": ("<s>", "</s>", "<pad>"),
    "T5": (None, "</s>", "<pad>"),
    "Gemma": ("<bos>", "<eos>", "<pad>"),
    "Llama 3": ("<|begin_of_text|>", "<|end_of_text|>", None),
    "CLIP": ("<|startoftext|>", "<|endoftext|>", None),
    "open_clip": ("<start_of_text>", "<end_of_text>", None),
    "GPT-2": (None, "<|endoftext|>", None),
    "BERT": ("[CLS]", "[SEP]", "[PAD]"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_known_by_their_usual_names(tmp_path: Path, family: str) -> None:
    """Without a tokenizer_config.json. Tokens that a family does not have are its end token."""
    from tokenizers import Tokenizer, models

    start, end, pad = FAMILIES[family]
    names = ["x", *(name for name in (pad, end, start) if name is not None), "[UNK]"]
    Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    ours = load_tokenizer(str(tmp_path / "tokenizer.json"))
    wanted = [names.index(name or end) for name in (start, end, pad)]
    assert [ours.start_id, ours.end_id, ours.pad_id] == wanted
    assert ours.vocab_size == len(names)


def test_special_tokens_may_be_added_behind_the_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"x": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    assert (ours.start_id, ours.end_id, ours.pad_id, ours.vocab_size) == (2, 3, 4, 5)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    assert load_tokenizer(str(tmp_path)).end_id == 4


def test_missing_start_and_pad_fall_back_to_end(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "gpt2-like")
    config = {"bos_token": None, "eos_token": "<|end|>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(str(folder))
    assert (ours.start_id, ours.end_id, ours.pad_id) == (2, 2, 2)


def test_captions_that_are_not_cleaned_are_those_that_cleaning_leaves_alone() -> None:
    """All printable ASCII characters except &, alone, in pairs, and in sequences special to HTML or mojibake."""
    ftfy = pytest.importorskip("ftfy")
    letters = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    pairs = [a + b for a in letters for b in letters]
    odd = ["<b>x</b>", "\\u00e9", "=C3=A9", "%C3%A9", "#233;", "x amp; y", "lt;", "`` quoted ''", "A~^i`"]
    for text in [
        *letters,
        *pairs,
        *odd,
        "".join(letters),
        *(c for c in CAPTIONS if c.isascii() and "&" not in c),
    ]:
        if text.isprintable():
            assert html.unescape(html.unescape(ftfy.fix_text(text))) == text


def made_tokenizer(kind: str) -> Any:
    """A small tokenizer of the kind of GPT-2 and Llama 3 (BPE), BERT (WordPiece), or T5 and Llama 2 (Unigram)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        specials = ["<pad>", "<s>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=260, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    return tokenizer


NAMES = {
    "BPE": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "WordPiece": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    "Unigram": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_folder_saved_by_transformers_gives_its_tokens(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=made_tokenizer(kind), **NAMES[kind]).save_pretrained(tmp_path)
    peer, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    unheard = ["zebra quux 12,345 ½ ﬁn ÀÉ", "tab\there  two  spaces ", "🦓 z\u0301ebra"]
    for caption in [*CAPTIONS, *unheard]:
        ids = ours.encode(caption)
        assert ids == peer.encode(caption, add_special_tokens=False)
        want = peer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == want
    start, end = ("cls_token_id", "sep_token_id") if kind == "WordPiece" else ("bos_token_id", "eos_token_id")
    assert (ours.start_id, ours.end_id) == (getattr(peer, start), getattr(peer, end))
    assert ours.pad_id == (peer.eos_token_id if kind == "BPE" else peer.pad_token_id)
    assert ours.vocab_size == len(peer)
