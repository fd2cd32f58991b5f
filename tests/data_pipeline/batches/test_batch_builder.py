"""Batches against tars read by tarfile and Pillow, against any split over ranks, and against a counted epoch."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import random
import re
import struct
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import Batch, SourceSpec, StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.hashing import Purpose, hash64
from data_pipeline.order import digest
from data_pipeline.order.stream_order import row_keys, sample_ids
from data_pipeline.transforms.augment import choose_crop, draw_augmentations
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.transforms.text_formats import PackedFormat
from tests.support.samples import LENGTH, SIZE, WORDS, members, pairs, write_packed, write_source

ARRAYS = ("pixels", "tokens", "used", "weights", "sample_ids", "row_keys")


def read_tar(path: Path) -> list[dict[str, bytes]]:
    """Samples of a tar, read by the standard library."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return list(samples.values())


def joined(parts: list[Batch], name: str) -> np.ndarray:
    return np.concatenate([getattr(part, name) for part in parts])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StreamSpec]:
    root = tmp_path_factory.mktemp("mixture")
    spec = pairs(
        root,
        batch=12,
        first=write_source(root / "first", [5, 9, 4]),
        second=SourceSpec(str(write_source(root / "second", [7])), repeat=2),
    )
    return root, spec


def test_rows_are_what_tarfile_and_pillow_give(mixture: tuple[Path, StreamSpec]) -> None:
    root, spec = mixture
    builder = BatchBuilder(spec)
    words = {word: i + 4 for i, word in enumerate(WORDS)}
    for step in (0, 3):
        batch = builder.make(step, 0, 12)
        refs = builder.order.refs(step)
        served = assigned = 0
        for i in range(12):
            name = ("first", "second")[refs.source[i]]
            shard, index, epoch = (int(a[i]) for a in (refs.shard, refs.index, refs.epoch))
            sample = read_tar(root / name / f"{shard:05d}.tar")[index]
            key = row_keys(spec.seed, name, *(np.array([v]) for v in (shard, index, epoch)), 0)[0]
            image = Image.open(io.BytesIO(sample["png"]))
            x, y, w, h = choose_crop(
                *image.size, spec.image.crop, draw_augmentations(np.array([key]))[0].crop
            )
            mirrored = int(hash64(key, Purpose.FLIP)) & 1
            image = image.crop((x, y, x + w, y + h)).resize(
                (SIZE, h), Image.Resampling.BICUBIC
            )  # rows, then columns
            image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pixels = np.asarray(image)[:, ::-1] if mirrored else np.asarray(image)
            np.testing.assert_array_equal(batch.pixels[i], pixels)
            np.testing.assert_array_equal(batch.images[i], pixels.transpose(2, 0, 1))
            caption = sample["txt"].decode().split()[: LENGTH - 2]
            tokens = [1, *(words.get(word, 3) for word in caption), 2]
            assert batch.tokens[i].tolist() == tokens + [0] * (LENGTH - len(tokens))
            assert batch.used[i] == len(tokens)
            assert batch.row_keys[i] == key
            assert batch.sample_ids[i] == sample_ids(name, np.array([shard]), np.array([index]))[0]
            place = ("pairs", i, name, f"{shard:05d}.tar", index, 0, epoch)
            served += digest.row_digest(*place, (x, y, w, h, mirrored), 0)
            assigned += digest.row_digest(*place, (), -1)
        assert (batch.batch_digest, batch.order_digest) == (served % 2**64, assigned % 2**64)
        assert batch.samples == {
            name: int((refs.source == k).sum()) for k, name in enumerate(("first", "second"))
        }
        assert batch.skipped == {}
        assert (batch.weights == 1).all()


@pytest.mark.parametrize("cuts", [(0, 6, 12), (0, 3, 6, 9, 12), (0, 1, 2, 12), tuple(range(13))])
def test_any_split_over_ranks_is_the_same_batch(
    mixture: tuple[Path, StreamSpec], cuts: tuple[int, ...]
) -> None:
    whole = BatchBuilder(mixture[1])
    # Every slice by a builder of its own, and steps out of order: no state may leak in.
    for step in (4, 0, 2):
        parts = [BatchBuilder(mixture[1]).make(step, a, b) for a, b in pairwise(cuts)]
        want = whole.make(step, 0, 12)
        for name in ARRAYS:
            np.testing.assert_array_equal(joined(parts, name), getattr(want, name))
        for name in ("batch_digest", "order_digest"):
            assert sum(getattr(part, name) for part in parts) % 2**64 == getattr(want, name)
        for source in want.samples:
            assert sum(part.samples.get(source, 0) for part in parts) == want.samples[source]


def test_pixels_go_into_the_memory_that_is_given(mixture: tuple[Path, StreamSpec]) -> None:
    builder = BatchBuilder(mixture[1])
    memory = np.full((5, 1, SIZE, SIZE, 3), 77, np.uint8)
    batch = builder.make(1, 3, 7, pixels=memory[:4])
    np.testing.assert_array_equal(memory[:4, 0], builder.make(1, 3, 7).pixels)
    assert np.shares_memory(batch.pixels, memory)
    assert (memory[4] == 77).all()
    for wrong in (memory, memory[:4, :, :, ::-1], memory[:4].astype(np.int8)):
        with pytest.raises(ValueError, match=r"expected contiguous uint8 \(4, 1, 12, 12, 3\)"):
            builder.make(1, 3, 7, pixels=wrong)


def test_a_pickled_batch_leaves_its_pixels_out_of_band(mixture: tuple[Path, StreamSpec]) -> None:
    buffers: list[pickle.PickleBuffer] = []
    batch = BatchBuilder(mixture[1]).make(0, 0, 3)
    head = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    assert 3 * SIZE * SIZE * 3 in [buffer.raw().nbytes for buffer in buffers]
    np.testing.assert_array_equal(pickle.loads(head, buffers=buffers).images, batch.images)


def test_a_known_bad_sample_is_replaced_undecoded_as_a_broken_one_is(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    bad = (0, 4)
    write_source(whole / "source", [9])
    write_source(broken / "source", [9], {bad: {"png": b"broken", "txt": b"a"}})
    spared = BatchBuilder(pairs(whole, batch=9, source=whole / "source"))
    spared.known_bad["source", *bad] = "undecodable"
    want = BatchBuilder(pairs(broken, batch=9, source=broken / "source")).make(0, 0, 9)
    found = spared.make(0, 0, 9)
    assert found.skipped == want.skipped == {"source": {"undecodable": 1}}
    assert found.batch_digest == want.batch_digest
    assert found.bad[0] == want.bad[0] | {"url": found.bad[0]["url"], "detail": ""}
    np.testing.assert_array_equal(found.pixels, want.pixels)


def test_an_epoch_serves_every_sample_once(tmp_path: Path) -> None:
    spec = pairs(tmp_path, batch=6, only=write_source(tmp_path / "only", [5, 9, 4]))
    builder = BatchBuilder(spec)
    ids = np.concatenate([builder.make(step, 0, 6).sample_ids for step in range(6)])
    shards, indices = np.repeat([0, 1, 2], [5, 9, 4]), np.concatenate([np.arange(n) for n in (5, 9, 4)])
    every = np.sort(sample_ids("only", shards, indices))
    np.testing.assert_array_equal(np.sort(ids[:18]), every)
    np.testing.assert_array_equal(np.sort(ids[18:]), every)
    assert (ids[:18] != ids[18:]).any()


def test_seed_changes_order_and_crops(mixture: tuple[Path, StreamSpec]) -> None:
    spec = mixture[1]
    one, other = (BatchBuilder(dataclasses.replace(spec, seed=s)).make(0, 0, 12) for s in (1, 2))
    assert one.order_digest != other.order_digest
    assert (one.sample_ids != other.sample_ids).any()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_packed_text(tmp_path: Path, dtype: type) -> None:
    source = write_packed(tmp_path / "packed", [4, 3], dtype=dtype)
    spec = StreamSpec("text", 3, {"t": SourceSpec(str(source))}, batch=7, text=PackedFormat(LENGTH))
    builder = BatchBuilder(spec)
    batch = builder.make(0, 0, 7)
    refs = builder.order.refs(0)
    np.testing.assert_array_equal(
        batch.tokens, np.repeat((refs.shard * 1000 + refs.index)[:, None], LENGTH, 1)
    )
    assert batch.tokens.dtype == np.int32
    assert batch.pixels is None
    assert batch.images is None
    assert (batch.used == LENGTH).all()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"length": LENGTH + 1}, rf"00000\.tar.*9 tokens, but text\.length is {LENGTH}"),
        ({"dtype": np.int64}, r"00000\.tar.*int64 \[8\]; packed text is uint16 or uint32"),
    ],
)
def test_packed_text_of_another_shape_is_named(tmp_path: Path, written: dict, message: str) -> None:
    source = write_packed(tmp_path / "packed", [4], **written)
    builder = BatchBuilder(
        StreamSpec("text", 3, {"t": SourceSpec(str(source))}, batch=2, text=PackedFormat(LENGTH))
    )
    for attempt in (builder.check, lambda: builder.make(0, 0, 2)):
        with pytest.raises(UserError, match=message):
            attempt()


def npy_with_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + bytes(2 * LENGTH)


def spoilt_npy() -> Iterator[bytes]:
    """Damaged npy files: an npz, wrong sizes, headers that break Python's parser, and 300 random damages."""
    out = io.BytesIO()
    np.savez(out, a=np.zeros(LENGTH, np.uint16))
    yield out.getvalue()
    header = "{'descr': '<u2', 'fortran_order': False, 'shape': (%s,)}"
    for shape in (10**15, 10**30, -8, LENGTH + 1, "-" * 8000 + "8"):
        yield npy_with_header(header % shape)
    yield from map(npy_with_header, ("(" * 9000, "-" * 9000 + "1", ""))
    rng = random.Random(4)
    for _ in range(300):
        damaged = bytearray(npy_with_header(header % LENGTH))
        at = rng.randrange(10, 19)  # in "{'descr':"
        damaged[at] = rng.choice([byte for byte in b"\x00\xff()[]{}'\"" if byte != damaged[at]])
        yield bytes(damaged)


def test_spoilt_packed_text_is_replaced_and_counted(tmp_path: Path) -> None:
    spoilt = list(spoilt_npy())
    source = write_packed(tmp_path / "t", [4])
    builder = BatchBuilder(
        StreamSpec("text", 3, {"t": SourceSpec(str(source))}, batch=4, text=PackedFormat(LENGTH))
    )
    good = builder.make(0, 0, 4)
    reader = builder._rows._readers["t"]
    whole = reader.read
    details: list[str] = []
    for number, npy in enumerate(spoilt):
        bad = number % 4

        def read(shard: int, index: int, bad: int = bad, npy: bytes = npy) -> tuple[str, dict[str, bytes]]:
            return ("spoilt", {"npy": npy}) if index == bad else whole(shard, index)

        reader.read = read  # type: ignore[method-assign]
        batch = builder.make(0, 0, 4)
        assert batch.skipped == {"t": {"undecodable": 1}}, npy[:200]
        details.append(str(batch.bad[0]["detail"]))
        assert batch.order_digest == good.order_digest
        assert bad not in batch.tokens[:, 0]
    assert "None" not in details
    claims = [
        re.match(r"the header claims (-?\d+) bytes of uint16, the file has (\d+)", text) for text in details
    ]
    sizes = {tuple(map(int, match.groups())) for match in claims if match}
    assert len(sizes) > 2
    assert all(claimed != available for claimed, available in sizes)


def test_pickles_in_packed_text_are_never_loaded(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.save(out, np.array([print] * LENGTH, dtype=object), allow_pickle=True)
    source = write_source(tmp_path / "packed", [1], {(0, 0): {"npy": out.getvalue()}})
    builder = BatchBuilder(
        StreamSpec("text", 3, {"t": SourceSpec(str(source))}, batch=1, text=PackedFormat(LENGTH))
    )
    with pytest.raises(UserError, match=r"undecodable.*allow_pickle"):
        builder.check()


def test_a_stream_without_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.x: write image, text or both$"):
        StreamSpec("x", 0, {"a": SourceSpec("p")}, batch=2)
    with pytest.raises(UserError, match=r"data\.x\.sources: there are none; write at least one source"):
        StreamSpec("x", 0, {}, batch=2, text=PackedFormat(4))


def test_evaluation_is_one_pass_in_manifest_order(tmp_path: Path) -> None:
    source = write_source(tmp_path / "held_out", [5, 2, 4])
    spec = dataclasses.replace(pairs(tmp_path, batch=4, held_out=source), image=ImageSpec(SIZE))
    builder = EvaluationPass(spec)
    assert (len(builder), builder.samples) == (3, 11)
    batches = [builder.make(number, 0, 4) for number in range(3)]
    places = [(shard, index) for shard, count in enumerate([5, 2, 4]) for index in range(count)]
    meta = [row for batch in batches for row in batch.meta]
    for i, (shard, index) in enumerate(places):
        sample = members(shard, index)
        assert meta[i]["key"] == f"{shard:05d}{index:04d}"
        assert meta[i]["caption"] == sample["txt"].decode()
        assert meta[i]["json"] == json.loads(sample["json"])
        image = Image.open(io.BytesIO(sample["png"])).crop((2, 0, 22, 20))
        want = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        np.testing.assert_array_equal(batches[i // 4].images[i % 4], want)
    assert joined(batches, "weights").tolist() == [1.0] * 11 + [0.0]
    assert meta[11] == {"key": None, "caption": None, "json": {}}
    assert len(np.unique(joined(batches, "sample_ids")[:11])) == 11
    # Ranks, also of uneven size, see slices of the same batch.
    for cuts in ((0, 2, 4), (0, 1, 4)):
        parts = [EvaluationPass(spec).make(2, a, b) for a, b in pairwise(cuts)]
        for name in ARRAYS:
            np.testing.assert_array_equal(joined(parts, name), getattr(batches[2], name))
        assert sum(part.batch_digest for part in parts) % 2**64 == batches[2].batch_digest


def test_an_unusable_sample_has_no_weight_in_evaluation(tmp_path: Path) -> None:
    source = write_source(tmp_path / "held_out", [4], {(0, 2): {"png": b"broken", "txt": b"a"}})
    batch = EvaluationPass(pairs(tmp_path, batch=4, held_out=source)).make(0, 0, 4)
    assert batch.weights.tolist() == [1, 1, 0, 1]
    assert batch.skipped == {"held_out": {"undecodable": 1}}
    assert batch.samples == {"held_out": 3}
    assert batch.bad[0]["key"] == "000000002"


def test_evaluation_takes_one_source(mixture: tuple[Path, StreamSpec]) -> None:
    with pytest.raises(UserError, match="expected one source, not first, second"):
        EvaluationPass(mixture[1])


def test_images_alone_need_no_captions(tmp_path: Path) -> None:
    bare = {(0, i): {"png": members(0, i)["png"]} for i in range(3)}
    source = write_source(tmp_path / "bare", [3], bare)
    spec = dataclasses.replace(pairs(tmp_path, batch=3, bare=source), text=None)
    batch = BatchBuilder(spec).make(0, 0, 3)
    assert batch.tokens.shape == (3, 0)
    assert batch.images.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(("usable", "epochs"), [(7, 1), (10, 1), (10, 3), (19, 2)])
def test_skipped_counts_samples_and_bad_has_every_try(usable: int, epochs: int, tmp_path: Path) -> None:
    """Of 20 samples, all but `usable` are bad: each epoch replaces each of them once, with one or more tries."""
    write_source(tmp_path / "s", [20], {(0, n): {"png": b"x", "txt": b"x"} for n in range(usable, 20)})
    spec = StreamSpec("pairs", 0, {"s": SourceSpec(str(tmp_path / "s"))}, batch=20, image=ImageSpec(SIZE))
    builder = BatchBuilder(spec)
    batches = [builder.make(step, 0, 20) for step in range(epochs)]
    for batch in batches:
        assert batch.skipped == {"s": {"undecodable": 20 - usable}}
        assert sum(line["attempt"] == 0 for line in batch.bad) == 20 - usable
        assert batch.samples == {"s": 20}
    if usable <= 10:
        assert sum(len(batch.bad) for batch in batches) > epochs * (20 - usable)
