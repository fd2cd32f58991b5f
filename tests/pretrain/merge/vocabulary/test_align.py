"""Embeddings of models with different vocabularies: refused without a rule, else aligned token by token."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing

from data_pipeline.errors import UserError
from pretrain.merge import merge, plan
from pretrain.merge.vocabulary.align import aligned, vocabulary_names
from pretrain.weights.source import WeightSource, open_weights
from tests.support.merge_inputs import floats, write

WIDTH = 6


def word_level(words: list[str], special: list[str] = ["<s>"]) -> Tokenizer:  # noqa: B006
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in special])
    return tokenizer


def bpe(merges: list[tuple[str, str]], added: list[str]) -> Tokenizer:
    """Letters a to h, then the results of the merges, then the added tokens."""
    tokens = [*"abcdefgh", *(left + right for left, right in merges)]
    tokenizer = Tokenizer(BPE({token: n for n, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(added)
    return tokenizer


def model(
    folder: Path, tokenizer: Tokenizer | None, rows: int, seed: int, tied: bool = False, width: int = WIDTH
) -> Path:
    tensors = {
        "model.embed_tokens.weight": floats(seed, rows, width),
        "model.norm.weight": floats(seed + 50, width),
    }
    if not tied:
        tensors["lm_head.weight"] = floats(seed + 100, rows, width)
    write(folder, tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "eos_token_id": tokenizer.token_to_id("<s>") if tokenizer else 0,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        added = {
            n: {"content": t.content, "special": True}
            for n, t in tokenizer.get_added_tokens_decoder().items()
        }
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "x": 1}))
        (folder / "vocab.json").write_text("{}")
    return folder


def opened(*folders: Path) -> list[WeightSource]:
    return [open_weights(str(folder)) for folder in folders]


def read_config(source: WeightSource, name: str = "config.json") -> dict[str, object]:
    companion = source.companions[name]
    return json.loads(companion if isinstance(companion, bytes) else companion.read_bytes())


def joined(source: WeightSource) -> Tokenizer:
    content = source.companions["tokenizer.json"]
    raw = content if isinstance(content, bytes) else content.read_bytes()
    return Tokenizer.from_str(raw.decode())


def expected_rows(
    views: list[WeightSource], sources: list[WeightSource], tokenizers: list[Tokenizer], name: str
) -> list[np.ndarray]:
    """Check every token of the output tokenizer: the source's own row, else that of the first source with the token."""
    out = joined(views[0])
    vocabularies = [t.get_vocab() for t in tokenizers]
    by_number = {number: token for token, number in out.get_vocab().items()}
    whole = [source.array(name) for source in sources]
    made = []
    for i in range(len(sources)):
        rows = []
        for number in range(views[0].info(name)[1][0]):
            token = by_number.get(number)
            if token is None:
                rows.append(whole[0][number])
                continue
            owner = (
                i if token in vocabularies[i] else next(k for k, v in enumerate(vocabularies) if token in v)
            )
            rows.append(whole[owner][vocabularies[owner][token]])
        made.append(np.stack(rows))
    return made


def check(views: list[WeightSource], sources: list[WeightSource], tokenizers: list[Tokenizer]) -> None:
    for name in vocabulary_names(sources[0]):
        wanted = expected_rows(views, sources, tokenizers, name)
        for view, rows in zip(views, wanted, strict=True):
            assert view.info(name) == ("F32", rows.shape)
            np.testing.assert_array_equal(view.array(name), rows)
            flat = rows.ravel()
            for start in range(0, flat.size, 5):  # any range, also ones that cut rows and runs
                for stop in (start, start + 1, start + 17, flat.size):
                    stop = min(stop, flat.size)
                    np.testing.assert_array_equal(view.read(name, start, stop), flat[start:stop])
    for view, source in zip(views, sources, strict=True):
        assert view.array("model.norm.weight").tobytes() == source.array("model.norm.weight").tobytes()
        assert view.address == source.address
        assert view.hashes() == source.hashes()


A_WORDS = ["[unk]", "sun", "moon", "sky", "sea"]
B_WORDS = ["[unk]", "moon", "sea", "tree", "stone", "rain"]


@pytest.mark.parametrize("padding", [0, 5])
def test_union_token_by_token(tmp_path: Path, padding: int) -> None:
    tokenizers = [word_level(A_WORDS), word_level(B_WORDS, ["<s>", "<img>"])]
    folders = [
        model(tmp_path / str(i), t, t.get_vocab_size() + padding, seed=i) for i, t in enumerate(tokenizers)
    ]
    sources = opened(*folders)
    views = aligned(sources, "union")
    out = joined(views[1]).get_vocab()
    a, b = (t.get_vocab() for t in tokenizers)
    assert {t: n for t, n in out.items() if t in a} == a
    extra = sorted(set(b) - set(a), key=lambda t: b[t])
    assert [out[t] for t in extra] == list(range(len(a), len(a) + len(extra)))
    rows = max(len(a) + padding, len(out))
    assert read_config(views[0])["vocab_size"] == rows == views[1].info("lm_head.weight")[1][0]
    check(views, sources, tokenizers)
    for view in views:
        assert read_config(view)["eos_token_id"] == out["<s>"]
        decoder = read_config(view, "tokenizer_config.json")["added_tokens_decoder"]
        assert isinstance(decoder, dict)
        assert {one["content"]: int(n) for n, one in decoder.items()} == {
            "<s>": out["<s>"],
            "<img>": out["<img>"],
        }
        assert "vocab.json" not in view.companions
        assert any("vocab.json" in note for note in view.notes)
    text = "sun tree <img> sea"
    assert joined(views[0]).encode(text).tokens == ["sun", "tree", "<img>", "sea"]


def test_intersection_keeps_the_order_of_the_first(tmp_path: Path) -> None:
    tokenizers = [word_level(A_WORDS, ["<pad>", "<s>"]), word_level(B_WORDS)]
    for t in tokenizers:
        t.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    folders = [model(tmp_path / str(i), t, t.get_vocab_size(), seed=i) for i, t in enumerate(tokenizers)]
    sources = opened(*folders)
    views = aligned(sources, "intersect")
    out = joined(views[0])
    assert out.get_vocab() == {"[unk]": 0, "moon": 1, "sea": 2, "<s>": 3}
    assert out.encode("sea moon").ids == [3, 2, 1]
    check(views, sources, tokenizers)
    assert [read_config(v)["eos_token_id"] for v in views] == [3, 3]
    assert [read_config(v)["vocab_size"] for v in views] == [4, 4]


def test_a_token_that_a_setting_needs_must_stay(tmp_path: Path) -> None:
    tokenizers = [word_level(A_WORDS, ["<s>"]), word_level(B_WORDS, [])]
    folders = [str(model(tmp_path / str(i), t, t.get_vocab_size(), seed=i)) for i, t in enumerate(tokenizers)]
    wrong = r"config\.json: needs the token '<s>'"
    config_error = [view.config_error for view in aligned(opened(*map(Path, folders)), "intersect")]
    assert re.search(wrong, config_error[0] or "")
    with pytest.raises(UserError, match=wrong):
        plan(folders, beta=0.5, vocabulary="intersect")


@pytest.mark.parametrize("rule", ["union", "intersect"])
def test_merges_of_byte_pairs_go_with_their_tokens(tmp_path: Path, rule: str) -> None:
    common = [("a", "b"), ("ab", "c")]
    tokenizers = [
        bpe([*common, ("d", "e")], ["<s>", "<a>"]),
        bpe([("f", "g"), *common, ("fg", "h")], ["<b>", "<s>"]),
    ]
    sources = opened(
        *(model(tmp_path / str(i), t, t.get_vocab_size() + 3, seed=i) for i, t in enumerate(tokenizers))
    )
    views = aligned(sources, rule)
    check(views, sources, tokenizers)
    out = joined(views[0])
    text = "abc de fgh"
    wanted = {"union": ["abc", "de", "fgh"], "intersect": ["abc", "d", "e", "f", "g", "h"]}[rule]
    assert out.encode(text).tokens == wanted
    kept = {"union": {"<s>", "<a>", "<b>"}, "intersect": {"<s>"}}[rule]
    assert {t.content for t in out.get_added_tokens_decoder().values()} == kept


@pytest.mark.parametrize("padding", [0, 3])
def test_the_first_s_tokens_and_no_others(tmp_path: Path, padding: int) -> None:
    tokenizers = [word_level(A_WORDS, ["<s>"]), word_level(B_WORDS, ["<img>", "<s>"])]
    folders = [
        model(tmp_path / str(i), t, t.get_vocab_size() + padding, seed=i) for i, t in enumerate(tokenizers)
    ]
    sources = opened(*folders)
    views = aligned(sources, "first")
    check(views, sources, tokenizers)
    assert joined(views[1]).get_vocab() == tokenizers[0].get_vocab()
    assert [read_config(view)["vocab_size"] for view in views] == [
        tokenizers[0].get_vocab_size() + padding
    ] * 2
    assert [read_config(view)["eos_token_id"] for view in views] == [tokenizers[0].token_to_id("<s>")] * 2
    assert views[1].config_error is None
    merge(
        list(map(str, folders)),
        tmp_path / "out",
        beta=0.5,
        vocabulary="first",
        only="norm|lm_head",
        copy_rest="B",
    )
    out = open_weights(str(tmp_path / "out"))
    assert joined(out).get_vocab() == tokenizers[0].get_vocab()
    np.testing.assert_array_equal(
        out.array("model.embed_tokens.weight"), views[1].array("model.embed_tokens.weight")
    )
    back = aligned(list(reversed(sources)), "first")
    check(back, list(reversed(sources)), list(reversed(tokenizers)))


def test_numbers_that_the_first_s_settings_lack_follow_their_tokens(tmp_path: Path) -> None:
    tokenizers = [word_level(A_WORDS, ["<s>"]), word_level(B_WORDS, ["<img>", "<s>"])]
    folders = [model(tmp_path / str(i), t, t.get_vocab_size(), seed=i) for i, t in enumerate(tokenizers)]
    config = json.loads((folders[1] / "config.json").read_text())
    for token in ("sea", "<img>"):  # of which the first has one alone
        own = {"vision": {"image_token_index": tokenizers[1].token_to_id(token)}, "mask_token_id": None}
        (folders[1] / "config.json").write_text(json.dumps(config | own))
        view = aligned(opened(*folders), "first")[1]
        if token == "sea":
            moved = read_config(view)
            assert moved["vision"] == {"image_token_index": tokenizers[0].token_to_id("sea")}
            assert moved["mask_token_id"] is None
            assert moved["eos_token_id"] == tokenizers[0].token_to_id("<s>")
        else:
            assert re.search(r"needs the token '<img>'", view.config_error or "")


def test_what_may_go_by_token_under_a_name_that_is_not_known_is_told(tmp_path: Path) -> None:
    tokenizers = [word_level(A_WORDS), word_level(B_WORDS[:-1])]
    folders = [model(tmp_path / str(i), t, 8, seed=i) for i, t in enumerate(tokenizers)]
    told = "as long as the vocabulary, but not a known name"
    assert not any(told in note for note in plan(list(map(str, folders)), beta=0.5, vocabulary="first").notes)
    for seed, folder in enumerate(folders):
        tensors = {name: open_weights(str(folder)).array(name) for name in open_weights(str(folder)).names()}
        write(folder, tensors | {"final_logits_bias": floats(seed, 1, 8)})
    notes = plan(list(map(str, folders)), beta=0.5, vocabulary="first").notes
    assert sum(note.startswith("final_logits_bias: " + told) for note in notes) == 1


def test_union_of_three(tmp_path: Path) -> None:
    tokenizers = [word_level(A_WORDS), word_level(B_WORDS), word_level([*B_WORDS, "ice", "sun"])]
    sources = opened(
        *(model(tmp_path / str(i), t, t.get_vocab_size(), seed=i) for i, t in enumerate(tokenizers))
    )
    views = aligned(sources, "union")
    check(views, sources, tokenizers)
    assert set(joined(views[2]).get_vocab()) == {t for one in tokenizers for t in one.get_vocab()}


def test_padding_by_row(tmp_path: Path) -> None:
    short, long = word_level(A_WORDS), word_level(A_WORDS)
    long.add_special_tokens(["<img>", "<box>"])
    folders = [model(tmp_path / "a", short, 6, seed=1), model(tmp_path / "b", long, 16, seed=2)]
    sources = opened(*folders)
    views = aligned(sources, "pad")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        a, b = (source.array(name) for source in sources)
        np.testing.assert_array_equal(views[0].array(name), np.concatenate([a, b[6:]]))
        np.testing.assert_array_equal(views[1].array(name), b)
        np.testing.assert_array_equal(views[0].read(name, 31, 40), np.concatenate([a, b[6:]]).ravel()[31:40])
    assert joined(views[0]).get_vocab() == long.get_vocab()
    assert [read_config(v)["vocab_size"] for v in views] == [16, 16]
    assert any("has the most tokens" in note for note in views[0].notes)


def test_padding_without_tokenizers(tmp_path: Path) -> None:
    sources = opened(model(tmp_path / "a", None, 12, seed=1), model(tmp_path / "b", None, 8, seed=2))
    views = aligned(sources, "pad")
    a, b = (source.array("lm_head.weight") for source in sources)
    np.testing.assert_array_equal(views[1].array("lm_head.weight"), np.concatenate([b, a[8:]]))
    alike = opened(model(tmp_path / "c", word_level(A_WORDS), 12, seed=3), tmp_path / "a")
    for rule in ("first", "union", "intersect"):
        for these in (sources, alike):  # as many rows say nothing of whose they are
            with pytest.raises(UserError, match=r"needs a tokenizer\.json"):
                aligned(these, rule)
    assert aligned(alike, "pad") == alike


def test_padding_refuses_rows_of_other_tokens(tmp_path: Path) -> None:
    tokenizers = [word_level(A_WORDS), word_level(B_WORDS)]
    sources = opened(*(model(tmp_path / str(i), t, 8, seed=i) for i, t in enumerate(tokenizers)))
    with pytest.raises(UserError, match=r"row 1 is 'sun' in .*, 'moon' in .*different tokens"):
        aligned(sources, "pad")


def test_without_a_rule_differences_are_refused_with_the_rules(tmp_path: Path) -> None:
    same = [word_level(A_WORDS), word_level(A_WORDS)]
    sources = opened(*(model(tmp_path / f"s{i}", t, 8, seed=i) for i, t in enumerate(same)))
    assert aligned(sources, None) == sources
    other = [word_level(A_WORDS), word_level(B_WORDS)]
    sources = opened(*(model(tmp_path / f"o{i}", t, 8, seed=i) for i, t in enumerate(other)))
    with pytest.raises(
        UserError, match=r"A .* 8 rows, 6 tokens; B .* 8 rows, 7 tokens.*intersect.*union.*pad"
    ):
        aligned(sources, None)
    sources = opened(model(tmp_path / "r0", None, 8, seed=1), model(tmp_path / "r1", None, 9, seed=1))
    with pytest.raises(UserError, match=r"vocabularies differ: A .* 8 rows; B .* 9 rows"):
        aligned(sources, None)
    with pytest.raises(UserError, match="unknown rule 'rows'; choose one of first, intersect, pad, union"):
        aligned(sources, "rows")


def test_what_cannot_be_joined_is_named(tmp_path: Path) -> None:
    words, pairs = word_level(A_WORDS), bpe([("a", "b")], ["<s>"])
    bytewise = bpe([("c", "d")], ["<s>"])
    bytewise.pre_tokenizer = ByteLevel()
    pieces = Tokenizer(Unigram([("<unk>", 0.0), ("x", -1.0)], unk_id=0))
    pieces.add_special_tokens(["<s>"])
    more = Tokenizer(Unigram([("<unk>", 0.0), ("x", -1.0), ("y", -2.0)], unk_id=0))
    more.add_special_tokens(["<s>"])
    for number, (a, b, why) in enumerate([
        (words, pairs, "is WordLevel, .* BPE"),
        (pairs, bytewise, "differ in their pre_tokenizer"),
        (pieces, more, "the id of a piece is its position"),
    ]):  # fmt: skip
        sources = opened(
            model(tmp_path / f"{number}a", a, 30, seed=1), model(tmp_path / f"{number}b", b, 31, seed=2)
        )
        with pytest.raises(UserError, match=why):
            aligned(sources, "union")


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    sources = opened(model(tmp_path / "a", None, 8, seed=1), model(tmp_path / "b", None, 9, seed=1, width=7))
    with pytest.raises(UserError, match="of one width and dtype"):
        aligned(sources, "pad")


def test_a_tied_head_follows_its_embedding(tmp_path: Path) -> None:
    sources = opened(
        model(tmp_path / "a", None, 8, seed=1, tied=True), model(tmp_path / "b", None, 9, seed=1, tied=True)
    )
    assert [source.tied for source in sources] == [{"lm_head.weight": "model.embed_tokens.weight"}] * 2
    views = aligned(sources, "pad")
    assert views[0].tied == sources[0].tied
    assert views[0].info("model.embed_tokens.weight")[1] == (9, WIDTH)
    assert "lm_head.weight" not in views[0].names()


def test_sources_without_embeddings_stay(tmp_path: Path) -> None:
    plain = open_weights(str(write(tmp_path / "p", {"projector.weight": floats(1, 3, 3)})))
    sources = [plain, *opened(model(tmp_path / "a", None, 8, seed=1), model(tmp_path / "b", None, 9, seed=1))]
    views = aligned(sources, "pad")
    assert views[0] is plain
    assert views[1].info("lm_head.weight")[1][0] == 9


def test_merges_by_a_rule_and_copies_without_one(tmp_path: Path) -> None:
    """End to end: shared tokens are mixed, a token of one input keeps its row, the tokenizer has all tokens."""
    tokenizers = [word_level(A_WORDS), word_level(B_WORDS)]
    folders = [str(model(tmp_path / str(i), t, t.get_vocab_size(), seed=i)) for i, t in enumerate(tokenizers)]
    with pytest.raises(UserError, match="vocabularies differ"):
        merge(folders, tmp_path / "none", beta=0.25)
    merge(folders, tmp_path / "out", beta=0.25, vocabulary="union")
    a, b = (source.array("lm_head.weight") for source in opened(*map(Path, folders)))
    out = open_weights(str(tmp_path / "out"))
    got, numbers = out.array("lm_head.weight"), joined(out).get_vocab()
    ours, theirs = (t.get_vocab() for t in tokenizers)
    for token, number in numbers.items():
        x = a[ours[token]] if token in ours else b[theirs[token]]
        y = b[theirs[token]] if token in theirs else x
        wide = 0.25 * x.astype(np.float64) + 0.75 * y.astype(np.float64)
        np.testing.assert_array_equal(got[number], wide.astype(np.float32))
    merge(folders, tmp_path / "norms", beta=0.5, only="norm", copy_rest="B")
    assert open_weights(str(tmp_path / "norms")).array("lm_head.weight").tobytes() == b.tobytes()


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"model": 3}', '{"model": {"vocab": {"a": -1}}}', '{"model": {"vocab": {"a": 1, "b": 1}}}',
     '{"model": {"vocab": {"a": true}}}', '{"model": {"vocab": [["a", 1], ["a", 2]]}}',
     '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "a", "id": 2}]}', "\x00"],
)  # fmt: skip
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    folders = [model(tmp_path / "a", word_level(A_WORDS), 8, seed=1), model(tmp_path / "b", None, 9, seed=1)]
    (folders[1] / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"b: tokenizer\.json: (not valid JSON|malformed tokenizer)"):
        aligned(opened(*folders), "union")


@pytest.mark.parametrize(
    ("name", "place", "value", "why"),
    [
        ("tokenizer.json", ("model", "merges"), None, r"tokenizer\.json: malformed tokenizer"),
        ("tokenizer.json", ("model", "merges"), [3], r"tokenizer\.json: malformed tokenizer"),
        ("tokenizer.json", ("model", "merges"), [["a", {}]], r"tokenizer\.json: malformed tokenizer"),
        ("config.json", (), 3, "is not a JSON object: 3"),
        ("config.json", (), "x", 'is not a JSON object: "x"'),
    ],
)
def test_damaged_files_beside_weights_are_named(
    tmp_path: Path, name: str, place: tuple[str, ...], value: object, why: str
) -> None:
    folders = [
        model(tmp_path / str(i), bpe([pair], ["<s>"]), 14, seed=i)
        for i, pair in enumerate([("a", "b"), ("b", "c")])
    ]
    content = json.loads((folders[0] / name).read_text())
    if place:
        content[place[0]][place[1]] = value
    (folders[0] / name).write_text(json.dumps(content if place else value))
    with pytest.raises(UserError, match=why):
        plan(list(map(str, folders)), beta=0.5, vocabulary="union")


def test_architectures_that_are_no_list_say_nothing(tmp_path: Path) -> None:
    folder = model(tmp_path / "a", None, 8, seed=1, tied=True)
    (folder / "config.json").write_text('{"architectures": 3}')
    assert opened(folder)[0].tied == {}
