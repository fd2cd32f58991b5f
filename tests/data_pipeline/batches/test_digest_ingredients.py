"""What a batch hands to its digests, keys and identifiers: recomputed for each row from the tars and the refusals."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, SourceSpec, StreamSpec
from data_pipeline.order.digest import row_digest
from data_pipeline.order.stream_order import row_keys, sample_ids, stream_seed
from data_pipeline.transforms.captions import CaptionSpec
from data_pipeline.transforms.text_formats import TextSpec
from tests.support.ingredients import assert_each_changes
from tests.support.samples import LENGTH, members, pairs, write_source

COUNTS = [6, 5, 7, 1]
BAD = {(0, 1), (0, 4), (1, 0), (2, 3), (2, 5), (3, 0)}  # the last one is replaced from another shard
WORDS = ["red", "blue", "dot"]


def content(shard: int, index: int, bad: bool) -> dict[str, bytes]:
    """A sample whose captions are told apart by their first word, and its place by the next two."""
    captions = [f"{word} {shard} {index}" for word in WORDS]
    made = members(shard, index) | {"json": json.dumps({"captions": captions}).encode()}
    return made | ({"png": b"broken"} if bad else {})


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    root = tmp_path_factory.mktemp("digests")
    for name, broken in (("web", BAD), ("other", set())):
        places = [(shard, index) for shard, count in enumerate(COUNTS) for index in range(count)]
        write_source(root / name, COUNTS, {place: content(*place, place in broken) for place in places})
    made = pairs(root, batch=12, web=root / "web", other=SourceSpec(str(root / "other")))
    text = TextSpec(str(root / "tokenizer"), LENGTH, CaptionSpec(("json.captions",)))
    return dataclasses.replace(made, text=text)


def expected(builder: BatchBuilder, batch: Batch, row: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ingredients of the served row's digest and of the assigned one's, by the tokens, the order and the refusals."""
    refs, tokenizer = builder.order.refs(batch.step, row, row + 1), builder.tokenizer
    assert tokenizer is not None
    name = ("web", "other")[int(refs.source[0])]
    word, shard, index = tokenizer.decode(
        batch.tokens[row - batch.start, : batch.used[row - batch.start]]
    ).split()
    refused = [bad for bad in batch.bad if bad["row"] == row]
    assert [bad["attempt"] for bad in refused] == list(range(len(refused)))
    common = {"stream": "pairs", "row": row, "source": name, "epoch": int(refs.epoch[0])}
    served = common | {
        "shard_path": f"{int(shard):05d}.tar", "index": int(index), "attempt": len(refused),
        "caption": WORDS.index(word),
    }  # fmt: skip
    assigned = common | {
        "shard_path": f"{int(refs.shard[0]):05d}.tar", "index": int(refs.index[0]), "attempt": 0, "crop": (),
        "caption": -1,
    }  # fmt: skip
    return served, assigned


def test_digests_keys_and_ids_are_those_of_the_served_rows(spec: StreamSpec) -> None:
    """Replaced rows, later epochs, every caption, both sources, slices that do not begin at row 0."""
    builder, seen = BatchBuilder(spec), []
    for step, start, stop in [(0, 0, 12), (1, 3, 12), (2, 5, 9), (3, 0, 6), (9, 1, 11), (10, 0, 12)]:
        batch = builder.make(step, start, stop)
        rows = [builder.make(step, row, row + 1) for row in range(start, stop)]
        assert batch.batch_digest == sum(row.batch_digest for row in rows) % 2**64
        assert batch.order_digest == sum(row.order_digest for row in rows) % 2**64
        for row, alone in zip(range(start, stop), rows, strict=True):
            served, assigned = expected(builder, batch, row)
            assert alone.order_digest == row_digest(**assigned)
            place = [
                np.array([value])
                for value in (int(served["shard_path"][:5]), served["index"], served["epoch"])
            ]
            key = row_keys(spec.seed, served["source"], *place, served["attempt"])[0]
            assert batch.row_keys[row - start] == key
            assert batch.sample_ids[row - start] == sample_ids(served["source"], *place[:2])[0]
            crop = crop_of(builder, served, int(key))
            assert alone.batch_digest == row_digest(**served, crop=crop)
            seen.append(served | {"moved": served["shard_path"] != assigned["shard_path"]})
    assert {row["attempt"] for row in seen} >= {0, 1}
    assert any(row["moved"] for row in seen)
    assert {row["caption"] for row in seen} == {0, 1, 2}
    assert len({row["epoch"] for row in seen}) >= 3
    assert {row["source"] for row in seen} == {"web", "other"}


def crop_of(builder: BatchBuilder, served: dict[str, Any], key: int) -> tuple[int, ...]:
    """The crop that the sample gets under this key, from an image of 24 x 20 pixels."""
    from data_pipeline.transforms.augment import choose_crop, draw_augmentations

    assert builder.spec.image is not None
    (drawn,) = draw_augmentations(np.array([key], np.uint64))
    return (*choose_crop(24, 20, builder.spec.image.crop, drawn.crop), int(drawn.mirror))


def test_row_keys_and_ids_have_every_ingredient() -> None:
    def key(seed: int, source: str, shard: int, index: int, epoch: int, attempt: int) -> int:
        place = [np.array([value]) for value in (shard, index, epoch)]
        return int(row_keys(seed, source, *place, attempt)[0])

    base = {"seed": 1, "source": "ab", "shard": 2, "index": 3, "epoch": 4, "attempt": 0}
    others = {"seed": 2, "source": "a", "shard": 3, "index": 2, "epoch": 0, "attempt": 1}
    assert_each_changes(key, base, others)
    assert (
        len(
            {key(1, "a", *numbers, 0) for numbers in [(1, 2, 3), (2, 1, 3), (3, 2, 1), (1, 3, 2), (12, 3, 0)]}
        )
        == 5
    )
    assert_each_changes(
        lambda source, shard, index: int(sample_ids(source, np.array([shard]), np.array([index]))[0]),
        {"source": "ab", "shard": 2, "index": 3},
        {"source": "ba", "shard": 3, "index": 2},
    )


def test_a_streams_seed_is_run_stage_and_stream() -> None:
    base = {"run_seed": 0, "stage": "ab", "stream": "c"}
    assert_each_changes(
        stream_seed, base, [("run_seed", 1), ("stage", "a"), ("stream", "bc"), ("stream", "ab")]
    )
    assert stream_seed(0, "ab", "c") != stream_seed(0, "a", "bc")
    assert stream_seed(0, "ab", "c") != stream_seed(0, "c", "ab")
