"""Rows of a stream from its tars: order, replacement of unusable samples, crop, mirror, caption, tokens, digests."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image
from tokenizers import Tokenizer

from tests.support.naive_order import Change, Mixture, Source, simulate_order
from tests.support.reference import draws

PAD, START, END = 0, 1, 2  # of the tokenizers that the tests train
IMAGES = ("jpg", "jpeg", "png", "webp")
Members = dict[str, bytes]


class Unusable(Exception):
    """The content of a sample cannot be used; the text is the reason in metrics.jsonl."""


@dataclass
class Row:
    """One row of a global batch.

    sample:   equal for rows of the same sample
    attempts: samples that were tried before this one and were unusable, as (key, reason)
    key:      of the row's random choices
    """

    sample: tuple[str, int, int]
    key: int
    tokens: list[int]
    used: int
    pixels: np.ndarray | None
    crop: tuple[int, ...] = ()
    caption: int = -1
    attempts: list[tuple[str, str]] = field(default_factory=list)
    order_digest: int = 0
    batch_digest: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=64)
def read_source(path: str) -> list[tuple[str, list[tuple[str, Members]]]]:
    """(name, samples) of every tar of a folder in the order of names; a sample is (key, members)."""
    shards = []
    for file in sorted(Path(path).glob("*.tar")):
        samples: dict[str, Members] = {}
        with tarfile.open(file) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[extension] = content.read()
        shards.append((file.name, list(samples.items())))
    return shards


@lru_cache(maxsize=8)
def tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_file(f"{folder}/tokenizer.json")


def token_row(folder: str, caption: str, length: int) -> tuple[list[int], int]:
    """Start token, caption (cut to fit), end token, padding; and the number of tokens before the padding."""
    ids = tokenizer(folder).encode(caption, add_special_tokens=False).ids[: length - 2]
    row = [START, *ids, END]
    return row + [PAD] * (length - len(row)), len(row)


def recipe_rows(recipe: dict[str, Any], stage: str, name: str, steps: int) -> list[list[Row]]:
    """The rows of a recipe's stream for each step of a stage."""
    seed = draws.stream_seed(recipe["run"]["seed"], stage, name)
    return list(stream_rows(recipe["data"][name], name, seed, steps))


def stream_rows(stream: dict[str, Any], name: str, seed: int, steps: int) -> Iterator[list[Row]]:
    """The rows of the global batch for each step; `stream` has the keys of `data.STREAM` in a recipe."""
    settings = {key: as_source(value) for key, value in stream["sources"].items()}
    shards = {key: read_source(value["path"]) for key, value in settings.items()}
    sources = []
    for key, value in settings.items():
        shares = {k: v for k, v in value.items() if k != "path"}
        sources.append(Source(key, tuple(len(samples) for _, samples in shards[key]), **shares))
    batch = batch_schedule(stream)
    mixture = Mixture(0, tuple(sources), batch, by_sqrt=stream.get("share_by") == "sqrt")
    lanes = stream.get("lanes") or default_lanes(batch)
    for placed in simulate_order([mixture], steps, lanes, seed, run_length):
        assert not isinstance(placed, Change)
        yield [serve(stream, name, seed, shards, row, *sample) for row, sample in enumerate(placed)]


def run_length(samples: int) -> int:
    return min(64, max(1, samples // 16384))


def as_source(value: str | dict[str, Any]) -> dict[str, Any]:
    return {"path": value} if isinstance(value, str) else value


def batch_schedule(stream: dict[str, Any]) -> dict[int, int]:
    """First step -> rows."""
    batch = stream["batch"]
    return {int(step): rows for step, rows in batch.items()} if isinstance(batch, dict) else {0: batch}


def default_lanes(batch: dict[int, int]) -> int:
    """The largest common divisor of all batches up to 1024."""
    return max(d for d in range(1, 1025) if all(rows % d == 0 for rows in batch.values()))


def serve(
    stream: dict[str, Any], name: str, seed: int, shards: dict[str, Any], row: int, source: str, epoch: int,
    shard: int, index: int,
) -> Row:  # fmt: skip
    """The row of an assigned sample, or of the first usable sample in its place."""
    counts = [len(samples) for _, samples in shards[source]]
    tried, place = [], (shard, index)
    for attempt in range(17):
        if attempt:
            place = draws.replacement(seed, source, counts, (shard, index), epoch, attempt)
        sample_key, members = shards[source][place[0]][1][place[1]]
        key = draws.row_key(seed, source, *place, epoch, attempt)
        try:
            found = make_row(stream, members, key)
        except Unusable as error:
            tried.append((sample_key, str(error)))
            continue
        found.sample, found.key, found.attempts = (source, *place), key, tried
        paths = [file for file, _ in shards[source]]
        found.order_digest = digest(name, row, source, paths[shard], index, 0, epoch, (), -1)
        found.batch_digest = digest(
            name, row, source, paths[place[0]], place[1], attempt, epoch, found.crop, found.caption
        )
        return found
    raise AssertionError("17 unusable samples")


def make_row(stream: dict[str, Any], members: Members, key: int | None) -> Row:
    """The content of a sample under a row's key; without a key (evaluation) nothing is random."""
    if "image" not in stream:
        tokens = np.load(io.BytesIO(members["npy"])).tolist()
        return Row(("", 0, 0), 0, tokens, len(tokens), None)
    pixels, crop = image(stream["image"], members, key)
    text = stream["text"]
    candidates = captions(text, members)
    usable = [number for number, caption in enumerate(candidates) if caption.strip()]
    if not usable:
        raise Unusable("missing caption")
    chosen = usable[0 if key is None else draws.caption_number(key, len(usable))]
    tokens, used = token_row(text["tokenizer"], candidates[chosen].strip(), text["length"])
    return Row(("", 0, 0), 0, tokens, used, pixels, crop, chosen)


def captions(text: dict[str, Any], members: Members) -> list[str]:
    """The member txt, or the members and json fields of `captions.from`, in its order."""
    found: list[str] = []
    for place in text.get("captions", {}).get("from", ["txt"]):
        if place.startswith("json."):
            value = json.loads(members["json"]).get(place.removeprefix("json."), [])
            found += value if isinstance(value, list) else [value]
        elif place in members:
            found.append(members[place].decode())
    return found


def image(settings: dict[str, Any], members: Members, key: int | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """uint8 [size, size, 3] by Pillow, and the crop with a last 1 if mirrored."""
    content = next((members[extension] for extension in IMAGES if extension in members), None)
    if content is None:
        raise Unusable("missing image")
    try:
        whole = Image.open(io.BytesIO(content)).convert("RGB")
    except OSError:
        raise Unusable("undecodable") from None
    area = tuple(settings.get("crop", (1.0, 1.0)))
    is_random = key is not None and area != (1.0, 1.0)
    x, y, w, h = draws.crop_box(key, *whole.size, area) if is_random else draws.central_square(*whole.size)
    size, bicubic = settings["size"], Image.Resampling.BICUBIC
    # Rows before columns: Pillow rounds to 8 bits in between, and newer versions choose the order by shape.
    small = whole.crop((x, y, x + w, y + h)).resize((size, h), bicubic).resize((size, size), bicubic)
    mirrored = key is not None and settings.get("flip", False) and draws.is_mirrored(key)
    pixels = np.asarray(small)
    return (pixels[:, ::-1] if mirrored else pixels), (x, y, w, h, int(mirrored))


def digest(
    stream: str, row: int, source: str, path: str, index: int, attempt: int, epoch: int, crop: tuple[int, ...],
    caption: int,
) -> int:  # fmt: skip
    """xxh64 of 8-byte integers and of length-prefixed texts (data_pipeline/order/digest.py's docstring)."""
    numbers = (row, index, attempt, epoch, caption, len(crop), *crop)
    texts = b"".join(struct.pack("<q", len(text.encode())) + text.encode() for text in (stream, source, path))
    return xxhash.xxh64_intdigest(struct.pack(f"<{len(numbers)}q", *numbers) + texts)


def held_out_rows(stream: dict[str, Any], path: str) -> list[Row]:
    """The usable samples of a held-out source, once, in the order of the tars; `fields` is the json member."""
    found = []
    for _, samples in read_source(path):
        for _, members in samples:
            try:
                row = make_row(stream, members, None)
            except Unusable:
                continue
            row.fields = json.loads(members.get("json", b"{}"))
            found.append(row)
    return found
