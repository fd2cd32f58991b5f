"""What is drawn for a row: uniform, independent between purposes and keys, and drawn again for a replacement."""

from __future__ import annotations

import dataclasses
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.hashing import hash64, key64
from data_pipeline.order.stream_order import row_keys, stream_seed
from data_pipeline.transforms.augment import Augmentation, choose_crop, draw_augmentations
from data_pipeline.transforms.captions import CaptionSpec, pick_caption
from data_pipeline.transforms.text_formats import TextSpec
from tests.support.samples import LENGTH, SIZE, members, pairs, pixels, write_source

MANY = 6000
# Chi-square of k degrees of freedom is above k + 4 sqrt(2 k) + 6 once in more than 10,000 draws; the keys are fixed.


def limit(degrees: int) -> float:
    return degrees + 4 * (2 * degrees) ** 0.5 + 6


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.fixture(scope="module")
def draws() -> list[Augmentation]:
    """Of neighbouring samples of one source, as a run has them."""
    return draw_augmentations(
        row_keys(7, "photos", np.zeros(MANY, int), np.arange(MANY), np.zeros(MANY, int), 0)
    )


def classes(draws: list[Augmentation]) -> dict[str, np.ndarray]:
    """Each draw in four equally likely classes, the flip in two."""
    table = {"flip": np.array([draw.mirror for draw in draws]).astype(int)}
    table["caption"] = np.array([draw.caption * 4 >> 64 for draw in draws])
    table["low bits of the caption"] = np.array([draw.caption & 3 for draw in draws])
    for candidate in (0, 1, 9):
        area, ratio, x, y = zip(*[draw.crop[candidate] for draw in draws], strict=True)
        table[f"area {candidate}"] = (np.array(area) * 4).astype(int)
        table[f"ratio {candidate}"] = (np.log(np.array(ratio) * 4 / 3) / np.log(16 / 9) * 4).astype(int)
        table[f"x {candidate}"] = np.array([value * 4 >> 64 for value in x])
        table[f"y {candidate}"] = np.array([value * 4 >> 64 for value in y])
    return table


def test_every_draw_is_uniform(draws: list[Augmentation]) -> None:
    for name, values in classes(draws).items():
        kinds = 2 if name == "flip" else 4
        counts = np.bincount(values, minlength=kinds)
        assert chi_square(counts, MANY / kinds) < limit(kinds - 1), name


def test_draws_of_different_purposes_know_nothing_of_each_other(draws: list[Augmentation]) -> None:
    for (one, first), (other, second) in combinations(classes(draws).items(), 2):
        table = np.zeros((first.max() + 1, second.max() + 1))
        np.add.at(table, (first, second), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / MANY
        degrees = (table.shape[0] - 1) * (table.shape[1] - 1)
        assert chi_square(table, expected) < limit(degrees), (one, other)


@pytest.mark.parametrize(
    "changed", ["seed", "source", "shard", "index", "epoch", "attempt", "stage", "stream"]
)
def test_each_part_of_the_key_draws_everything_anew(changed: str, draws: list[Augmentation]) -> None:
    """The draws of rows that differ in one part only agree as often as chance has it."""
    count = 1000
    part = {"seed": 7, "source": "photos", "shard": 3, "epoch": 2, "attempt": 0}
    other = part | {changed: {"seed": 8, "source": "scenes"}.get(changed, 5)}
    if changed in ("stage", "stream"):
        part["seed"], other["seed"] = (
            stream_seed(7, *names) for names in (("a", "b"), ("c", "b") if changed == "stage" else ("a", "c"))
        )
    index = np.arange(count)
    one, two = (
        draw_augmentations(
            row_keys(
                given["seed"], given["source"], np.full(count, given["shard"]),
                index + (given is other and changed == "index") * count,
                np.full(count, given["epoch"]), given["attempt"],
            )
        )
        for given in (part, other)
    )  # fmt: skip
    for name, values in classes(one).items():
        same = int((values == classes(two)[name]).sum())
        chance = 0.5 if name == "flip" else 0.25
        assert abs(same - count * chance) < 4.5 * (count * chance * (1 - chance)) ** 0.5, name
    assert not {draw.caption for draw in one} & {draw.caption for draw in two}


@pytest.mark.parametrize(("width", "height"), [(6, 5), (4, 7)])
def test_every_place_of_a_crop_is_as_likely(width: int, height: int, draws: list[Augmentation]) -> None:
    """Boxes of one size have all places in the image, its edges included, equally often."""
    places: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
    for draw in draws:
        x, y, w, h = choose_crop(width, height, (0.2, 0.6), draw.crop)
        of_size = places.setdefault((w, h), {})
        of_size[x, y] = of_size.get((x, y), 0) + 1
    judged = 0
    for (w, h), counts in places.items():
        possible = (width - w + 1) * (height - h + 1)
        total = sum(counts.values())
        if total < 20 * possible or possible < 2:
            continue
        judged += 1
        table = np.array([counts.get((x, y), 0) for x in range(width - w + 1) for y in range(height - h + 1)])
        assert table.sum() == total, (w, h)
        assert chi_square(table, total / possible) < limit(possible - 1), (w, h)
    assert judged >= 3


@pytest.mark.parametrize("area", [(0.25, 0.25), (0.1, 0.4), (0.5, 1.0)])
def test_the_area_of_a_crop_is_within_its_range(area: tuple[float, float], draws: list[Augmentation]) -> None:
    shares = []
    for draw in draws[:1500]:
        x, y, w, h = choose_crop(400, 300, area, draw.crop)
        assert 0 <= x <= 400 - w
        assert 0 <= y <= 300 - h
        assert 0.74 < w / h < 1.35
        shares.append(w * h / (400 * 300))
    # A side is rounded to a pixel, and a crop that does not fit is drawn again: large areas are rarer near 1.
    assert min(shares) == pytest.approx(area[0], abs=0.02)
    assert max(shares) == pytest.approx(area[1], abs=0.02 if area[1] < 1 else 0.1)
    if area[1] < 0.5:
        assert np.mean(shares) == pytest.approx(sum(area) / 2, abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_every_caption_is_as_likely(count: int, draws: list[Augmentation]) -> None:
    given = {"json": json.dumps({"all": [str(number) for number in range(9)]}).encode()}
    spec = CaptionSpec(("json.all",), top=count)
    chosen = [pick_caption(given, draw.caption, spec)[1] for draw in draws[:2000]]
    counts = np.bincount(chosen, minlength=count)
    assert len(counts) == count
    assert chi_square(counts, 2000 / count) < limit(count - 1) or count == 1


def plain_key(seed: int, source: str, shard: int, index: int, epoch: int, attempt: int) -> np.ndarray:
    return np.array([int(hash64(seed, key64(source), shard, index, epoch, attempt))], np.uint64)


def test_a_replacement_has_the_draws_of_its_own_sample_and_attempt(tmp_path: Path) -> None:
    """Pixels, caption and key of every row of three epochs; half of the samples are broken."""
    captions = ["a red dot", "a blue dot", "red", "blue"]
    bad = {1, 4, 5, 8}
    given = {
        (0, i): {
            "png": b"broken" if i in bad else members(0, i)["png"],
            "json": json.dumps({"all": [f"{text} {i}" for text in captions]}).encode(),
        }
        for i in range(10)
    }
    spec = pairs(tmp_path, batch=10, a=write_source(tmp_path / "a", [10], given))
    assert spec.text is not None
    spec = dataclasses.replace(spec, text=TextSpec(spec.text.tokenizer, LENGTH, CaptionSpec(("json.all",))))
    builder, attempts = BatchBuilder(spec), set()
    for step in range(3):
        batch, refs = builder.make(step, 0, 10), builder.order.refs(step)
        for row in range(10):
            tried = sum(line["row"] == row for line in batch.bad)
            words = builder.tokenizer.decode(batch.tokens[row].tolist()).split()  # type: ignore[union-attr]
            index, text = int(words[-1]), " ".join(words[:-1])
            assert (index == refs.index[row]) == (tried == 0)
            key = plain_key(spec.seed, "a", 0, index, int(refs.epoch[row]), tried)
            assert batch.row_keys[row] == key[0]
            (draw,) = draw_augmentations(key)
            assert text == captions[draw.caption * len(captions) >> 64]
            x, y, w, h = choose_crop(24, 20, (0.4, 1.0), draw.crop)
            image = Image.fromarray(pixels(0, index)).crop((x, y, x + w, y + h))
            image = image.resize((SIZE, h), Image.Resampling.BICUBIC)
            want = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            assert batch.pixels is not None
            np.testing.assert_array_equal(batch.pixels[row], want[:, ::-1] if draw.mirror else want)
            attempts.add(tried)
    assert {0, 1, 2} <= attempts
