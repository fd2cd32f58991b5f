"""Choice of a caption: by member, by score against a plain sort, and uniformly among the candidates."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.errors import ContentError, UserError
from data_pipeline.order.digest import row_digest
from data_pipeline.transforms.augment import draw_augmentations
from data_pipeline.transforms.captions import CaptionSpec, pick_caption
from data_pipeline.transforms.text_formats import TextSpec
from pretrain.recipe.sections.text_formats import CaptionOptions
from tests.support.samples import LENGTH, members, pairs, write_source

LAION_COCO = {
    "caption": "red car for sale", "similarity": 0.31, "top_caption": "a red car on a road",
    "all_captions": ["a car", "a red car on a road", "a road", "the vehicle"],
    "all_similarities": [0.28, 0.35, 0.2, 0.33],
}  # fmt: skip


def sample(**fields: Any) -> dict[str, bytes]:
    return {"json": json.dumps(fields).encode()}


def drawn(given: dict[str, bytes], spec: CaptionSpec | None, times: int = 300) -> Counter[tuple[str, int]]:
    draws = draw_augmentations(np.arange(times, dtype=np.uint64))
    return Counter(pick_caption(given, draw.caption, spec) for draw in draws)


def test_caption_comes_from_txt_then_json() -> None:
    json_member = json.dumps({"caption": "from json"}).encode()
    assert pick_caption({"txt": b" from txt \n", "json": json_member}, 1) == ("from txt", 0)
    assert pick_caption({"json": json_member}, 1) == ("from json", 0)
    assert pick_caption({"txt": b" \r\n", "json": json_member}, 1) == ("from json", 0)
    assert pick_caption({"txt": b"", "json": json_member}, 1) == ("from json", 0)


def test_one_of_several_captions_is_chosen_by_key() -> None:
    member = {"json": json.dumps({"caption": ["first", " ", None, "second", "third"]}).encode()}
    draws = draw_augmentations(np.arange(300, dtype=np.uint64))
    chosen = [pick_caption(member, draw.caption) for draw in draws]
    assert set(chosen) == {("first", 0), ("second", 3), ("third", 4)}
    for one in set(chosen):
        assert 70 < chosen.count(one) < 130
    assert pick_caption(member, None) == ("first", 0)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": b""}, "missing caption"),
        ({"txt": b" \n"}, "missing caption"),
        ({"json": b"{}"}, "missing caption"),
        ({"json": b'{"caption": null}'}, "missing caption"),
        ({"json": b'{"caption": []}'}, "missing caption"),
        ({"json": b'{"caption'}, "bad json"),
        ({"json": b"[1]"}, "bad json"),
        ({"txt": b"", "json": b"{}"}, "missing caption"),
        ({"txt": b"", "json": b'{"caption'}, "bad json"),
        ({"json": b"[" * 100_000}, "bad json"),
    ],
)
def test_a_sample_without_caption_is_a_verdict(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ContentError) as verdict:
        pick_caption(members, 0)
    assert verdict.value.reason == reason


def test_a_verdict_on_a_json_member_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ContentError) as verdict:
        pick_caption({"json": b'{"caption'}, 0)
    assert verdict.value.detail == "Unterminated string starting at: line 1 column 2 (char 1)"


def test_without_a_txt_the_usual_fields_are_looked_through_in_turn() -> None:
    assert pick_caption(sample(**LAION_COCO), None) == ("red car for sale", 0)
    del (fields := dict(LAION_COCO))["caption"]
    assert drawn(sample(**fields), None) == {("a red car on a road", 0): 300}
    del fields["top_caption"]
    assert set(drawn(sample(**fields), None)) == {(text, i) for i, text in enumerate(fields["all_captions"])}
    assert pick_caption(sample(caption=" ", captions=["", "one"], all_captions=["two"]), None) == ("one", 1)


def test_blip_2_draws_among_the_best_of_written_and_made_captions() -> None:
    spec = CaptionSpec(("json.caption", "json.all_captions"), ("json.similarity", "json.all_similarities"), 2)
    found = drawn(sample(**LAION_COCO), spec)
    assert set(found) == {("a red car on a road", 2), ("the vehicle", 4)}
    assert all(100 < count < 200 for count in found.values())
    assert pick_caption(sample(**LAION_COCO), None, spec) == ("a red car on a road", 2)
    three = dataclasses.replace(spec, top=3)
    assert set(drawn(sample(**LAION_COCO), three)) - set(found) == {("red car for sale", 0)}


def test_without_scores_the_first_are_kept() -> None:
    spec = CaptionSpec(("txt", "json.all_captions"), top=2)
    given = {"txt": b"written", **sample(all_captions=["", "one", "two"])}
    assert set(drawn(given, spec)) == {("written", 0), ("one", 2)}
    assert pick_caption({"txt": b"alone"}, 7, spec) == ("alone", 0)
    assert pick_caption({**sample(all_captions="one text")}, 7, spec) == ("one text", 0)


def test_a_broken_json_member_is_no_matter_where_none_of_its_fields_is_asked_for() -> None:
    given = {"txt": b"written", "json": b"{"}
    assert pick_caption(given, None, CaptionSpec(("txt",))) == ("written", 0)
    with pytest.raises(ContentError, match="bad json"):
        pick_caption(given, None, CaptionSpec(("txt", "json.caption")))


ODD = st.one_of(st.none(), st.booleans(), st.just(math.nan), st.just("0.9"), st.just(10**400), st.just([]))
SCORES = st.one_of(st.integers(-3, 3), st.floats(-2, 2), ODD)
TEXTS = st.one_of(st.sampled_from(["a", "b", "c", "d"]), st.sampled_from(["", "  ", None, 5, ["x"]]))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(TEXTS, max_size=6), st.lists(SCORES, max_size=7), st.integers(1, 5), st.integers(0, 2**64 - 1)
)
def test_the_best_are_those_of_a_plain_sort(texts: list, scores: list, top: int, draw: int) -> None:
    def score(number: int) -> float:
        value = scores[number] if number < len(scores) else None
        plain = type(value) in (int, float) and value != 10**400 and value == value
        return value if plain else -math.inf  # type: ignore[return-value]

    usable = [i for i, text in enumerate(texts) if isinstance(text, str) and text.strip()]
    ranked = [i for _, i in sorted((-score(i), i) for i in usable)][:top]
    given = sample(texts=texts, scores=scores)
    spec = CaptionSpec(("json.texts",), ("json.scores",), top)
    if not usable:
        with pytest.raises(ContentError, match="missing caption"):
            pick_caption(given, draw, spec)
        return
    choice = ranked[draw * len(ranked) // 2**64]
    assert pick_caption(given, draw, spec) == (texts[choice], choice)
    assert pick_caption(given, None, spec) == (texts[ranked[0]], ranked[0])


def test_the_choice_is_part_of_the_digest_and_of_the_row(tmp_path: Path) -> None:
    captions = ["a red dot", "a blue dot", "dot of number 3"]
    given = {(0, i): {"png": members(0, i)["png"], **sample(c=captions, s=[0.1, 0.9, 0.5])} for i in range(6)}
    spec = pairs(tmp_path, batch=6, source=write_source(tmp_path / "source", [6], given))
    assert spec.text is not None
    text = TextSpec(spec.text.tokenizer, LENGTH, CaptionSpec(("json.c",), ("json.s",), 2))
    spec = dataclasses.replace(spec, text=text, image=None)
    builder = BatchBuilder(spec)
    seen = set()
    for step in range(8):
        batch, refs = builder.make(step, 0, 6), builder.order.refs(step)
        want = 0
        for row, (key, index, epoch) in enumerate(zip(batch.row_keys, refs.index, refs.epoch, strict=True)):
            choice = (1, 2)[draw_augmentations(np.array([key]))[0].caption >> 63]
            tokens = builder.tokenizer.encode(captions[choice])  # type: ignore[union-attr]
            assert batch.tokens[row, 1 : len(tokens) + 1].tolist() == tokens
            want += row_digest("pairs", row, "source", "00000.tar", index, 0, epoch, (), choice)
            seen.add(choice)
        assert batch.batch_digest == want % 2**64
    assert seen == {1, 2}
    held_out = EvaluationPass(spec).make(0, 0, 6)
    assert [meta["caption"] for meta in held_out.meta or []] == ["a blue dot"] * 6


def test_a_recipe_says_it_in_three_fields() -> None:
    written = {"from": ["txt", "json.all_captions"], "scores": [None, "json.all_similarities"], "top": 2}
    wanted = CaptionSpec(("txt", "json.all_captions"), (None, "json.all_similarities"), 2)
    written_format = CaptionOptions.model_validate(
        {"captions": written, "tokenizer": "words", "length": 9}
    ).row_format()
    assert written_format == TextSpec("words", 9, wanted)
    assert CaptionOptions().row_format() == TextSpec("clip-bpe", 32, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), "write the members that contain captions"),
        ((("txt", "json"),), "write the members that contain captions"),
        ((("txt",), ("json.a", "json.b")), "2 entries for 1 members in `from`"),
        ((("txt",), ("a",)), r"scores: a: .* write json\.FIELD"),
        ((("txt",), (), 0), "top is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CaptionSpec(*arguments)


def test_the_expected_members_are_named(tmp_path: Path) -> None:
    spec = pairs(tmp_path, batch=2, source=write_source(tmp_path / "source", [3]))
    assert spec.text is not None
    text = TextSpec(spec.text.tokenizer, LENGTH, CaptionSpec(("json.made", "json.written")))
    with pytest.raises(UserError, match=r"a caption \(json\.made or json\.written\)"):
        BatchBuilder(dataclasses.replace(spec, text=text)).check()
