"""2,200 spoilt tars, images, captions and indexes: one named error, or every row served and every loss counted."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import ReadError, UserError
from data_pipeline.index.build import build_index
from data_pipeline.show import describe
from tests.fault import mutations
from tests.support.samples import SIZE, encode, members, pairs, pixels, write_source, write_tokenizer

COUNTS = [7, 1, 0, 9, 5]  # an empty shard and one of a single sample among them
SAMPLES = sum(COUNTS)
BATCH = 11
REASONS = {
    "undecodable", "too many pixels", "missing image", "missing caption", "bad json", "not UTF-8", "NUL in text",
}  # fmt: skip
SECONDS = 20  # a case takes milliseconds; longer is a hang

EPOCH = -(-SAMPLES // BATCH)  # steps

# 600 tars are 46 for each of the 13 ways to spoil one. Each is served twice, looked at and indexed.
IMAGES, CAPTIONS, TARS, STATS, INDEXES = 900, 200, 600, 100, 400


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"hangs for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def serve(spec: StreamSpec, steps: int = 2 * EPOCH) -> list[Batch]:
    """Two epochs, or `steps`, with what must hold of any batch whatever the data."""
    builder = BatchBuilder(spec)
    try:
        batches = [builder.make(step, 0, BATCH) for step in range(steps)]
    finally:
        builder.close()
    for batch in batches:
        assert batch.images is not None
        assert batch.images.shape == (BATCH, 3, SIZE, SIZE)
        assert len(batch.tokens) == sum(batch.samples.values()) == BATCH
        assert (batch.weights == 1).all()
        assert (batch.used >= 2).all()
        counted = Counter(bad["reason"] for bad in batch.bad if bad["attempt"] == 0)
        assert counted == sum((Counter(reasons) for reasons in batch.skipped.values()), Counter())
        assert {bad["reason"] for bad in batch.bad} <= REASONS
        assert all(bad["url"].endswith(".tar") and bad["key"] for bad in batch.bad)
    return batches


def refused(error: Exception, root: Path) -> None:
    """An error that a person can act on names a file or the source, and is one line."""
    assert str(root) in str(error) or "source" in str(error), error
    assert "\n" not in str(error)


def snapshot(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources' folder with the tokenizer, and one intact source in img2dataset's manner."""
    root = tmp_path_factory.mktemp("mutations")
    write_tokenizer(root / "tokenizer")
    write_source(root / "whole", COUNTS)
    for shard, count in enumerate(COUNTS):
        (root / "whole" / f"{shard:05d}_stats.json").write_text(
            json.dumps({"count": count, "successes": count})
        )
    return root


@pytest.fixture(scope="module")
def orders(pristine: Path) -> list[int]:
    """The order of the intact source: a digest for each batch of two epochs."""
    return [batch.order_digest for batch in serve(pairs(pristine, batch=BATCH, mixed=pristine / "whole"))]


def copy(pristine: Path, folder: Path, stats: bool = True) -> Path:
    folder.mkdir(parents=True)
    for path in (pristine / "whole").iterdir():
        if path.is_file() and (stats or path.suffix == ".tar"):
            os.link(path, folder / path.name)
    return folder


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def usable(data: bytes) -> bool:
    """Pillow's word on an image, the whole of it decoded, without its limits on the texts of a PNG."""
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.multiple(PngImagePlugin, MAX_TEXT_CHUNK=1 << 30, MAX_TEXT_MEMORY=1 << 31),
        ):
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as image:
                if image.width * image.height > 25_000_000:
                    return False
                image.load()
    except Exception:
        return False
    return True


def intact(kind: str, shard: int, index: int) -> bytes:
    return encode(pixels(shard, index, 40, 48), kind, **({"quality": 90} if kind == "JPEG" else {}))


@pytest.mark.parametrize("seed", range(30))
def test_images(pristine: Path, tmp_path: Path, seed: int) -> None:
    """Which samples are replaced, and by which, is known from Pillow's verdicts and the rule for replacements."""
    random = np.random.default_rng([1, seed])
    counts = [12, 1, 25, 17]
    places = [(shard, index) for shard, count in enumerate(counts) for index in range(count)]
    spoilt = [places[i] for i in random.choice(len(places), IMAGES // 30, replace=False)]
    given, bad = {}, set()
    for number, place in enumerate(spoilt):
        kind = ("JPEG", "PNG", "WEBP")[int(random.integers(0, 3))]
        mutate = mutations.IMAGES[(number + seed) % len(mutations.IMAGES)]
        data = mutate(random, intact(kind, *place))
        given[place] = {kind.lower().replace("jpeg", "jpg"): data, "txt": b"a red dot"}
        if not usable(data):
            bad.add(place)
    spec = pairs(pristine, batch=BATCH, mixed=write_source(tmp_path / "mixed", counts, given))
    with no_hang():
        batches = serve(spec, steps=-(-len(places) // BATCH))
    order = BatchBuilder(spec).order
    for batch in batches:
        refs = order.refs(batch.step)
        lines = []
        for i in range(BATCH):
            assigned = place = (int(refs.shard[i]), int(refs.index[i]))
            attempt = 0
            while place in bad:
                lines.append((i, "{:05d}{:04d}".format(*place)))
                attempt += 1
                place = order.replacement(0, *assigned, int(refs.epoch[i]), attempt)
        assert [(line["row"], line["key"]) for line in batch.bad] == lines
    assert bad


@pytest.mark.parametrize("seed", range(10))
def test_captions_and_json(pristine: Path, tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng([2, seed])
    given = {}
    for shard, count in enumerate(COUNTS):
        for index in range(count):
            good = members(shard, index)
            if random.random() < 0.5:
                given[shard, index] = good | {"txt": mutations.bad_caption(random, good["txt"])}
            else:
                without = {"png": good["png"], "json": mutations.bad_json(random, good["json"])}
                given[shard, index] = without if random.random() < 0.7 else good | without
    given[0, 0] = members(0, 0)  # a source of which nothing is usable is refused as a whole
    spec = pairs(pristine, batch=BATCH, mixed=write_source(tmp_path / "mixed", COUNTS, given))
    with no_hang():
        try:
            serve(spec)
        except UserError as error:
            refused(error, tmp_path)
    assert len(given) >= CAPTIONS // 10


@pytest.mark.parametrize("stats", [True, False])
def test_tars_that_are_left_alone_are_served(
    pristine: Path, orders: list[int], tmp_path: Path, stats: bool
) -> None:
    root = copy(pristine, tmp_path / "copy", stats)
    batches = serve(pairs(pristine, batch=BATCH, mixed=root))
    assert [batch.order_digest for batch in batches] == orders


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("stats", [True, False])
def test_tars(pristine: Path, orders: list[int], tmp_path: Path, seed: int, stats: bool) -> None:
    """Served whole, or refused by name; looked at and indexed as well. Nothing is ever written beside the tars."""
    for case in range(TARS // 60):
        random = np.random.default_rng([3, seed, case])
        root = copy(pristine, tmp_path / f"{case}", stats)
        victim = root / f"{(0, 1, 3, 4)[int(random.integers(0, 4))]:05d}.tar"
        mutate = mutations.TARS[(case * 60 + seed) % len(mutations.TARS)]
        rewrite(victim, mutate(random, victim.read_bytes()))
        files = snapshot(tmp_path)
        with no_hang():
            try:
                batches = serve(pairs(pristine, batch=BATCH, mixed=root))
            except (UserError, ReadError) as error:
                refused(error, root)
            else:
                if stats:  # counts fix the order, whatever became of the bytes
                    assert [batch.order_digest for batch in batches] == orders
            with suppress(UserError):
                describe(str(root))
            assert snapshot(tmp_path) == files
            try:
                build_index(str(root))
            except (UserError, ReadError) as error:
                refused(error, root)
            else:
                with suppress(
                    UserError, ReadError
                ):  # a tar that was walked holds no more surprises than before
                    serve(pairs(pristine, batch=BATCH, mixed=root), EPOCH)
        shutil.rmtree(root)  # a later case's snapshot need not list it
    assert not (tmp_path.parent / "escape.png").exists()


@pytest.mark.parametrize("seed", range(10))
def test_statistics(pristine: Path, tmp_path: Path, seed: int) -> None:
    for case in range(STATS // 10):
        random = np.random.default_rng([4, seed, case])
        root = copy(pristine, tmp_path / f"{case}")
        victim = root / f"{int(random.integers(0, len(COUNTS))):05d}_stats.json"
        damage = (mutations.bad_stats, mutations.bad_stats, *mutations.BYTES)[
            case % (2 + len(mutations.BYTES))
        ]
        rewrite(victim, damage(random, victim.read_bytes()))
        with no_hang():
            try:
                serve(pairs(pristine, batch=BATCH, mixed=root))
            except (UserError, ReadError) as error:
                refused(error, root)


@pytest.mark.parametrize("seed", range(40))
def test_indexes(pristine: Path, tmp_path: Path, seed: int) -> None:
    """A spoilt index is refused, or it was spoilt where it does not matter: never other samples than the tars hold."""
    root = copy(pristine, tmp_path / "whole")
    build_index(str(root))
    intact = {path: path.read_bytes() for path in sorted((root / "_index").rglob("*")) if path.is_file()}
    spec = pairs(pristine, batch=BATCH, mixed=root)
    want = [(b.batch_digest, b.pixels.tobytes()) for b in serve(spec, EPOCH)]  # type: ignore[union-attr]
    paths = list(intact)
    for case in range(INDEXES // 40):
        random = np.random.default_rng([5, seed, case])
        victim = paths[case % len(paths)]
        damage = mutations.BYTES[(case + seed) % len(mutations.BYTES)]
        victim.write_bytes(damage(random, intact[victim]))
        with no_hang():
            try:
                found = [(b.batch_digest, b.pixels.tobytes()) for b in serve(spec, EPOCH)]  # type: ignore[union-attr]
            except (UserError, ReadError) as error:
                refused(error, root)
            else:
                assert found == want
        victim.write_bytes(intact[victim])
    assert [(b.batch_digest, b.pixels.tobytes()) for b in serve(spec, EPOCH)] == want  # type: ignore[union-attr]
