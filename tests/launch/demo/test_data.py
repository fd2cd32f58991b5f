"""The demo's data: disjoint splits, formats that other tools read, and pictures that match their captions."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import webdataset
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.formats import refinedweb
from data_pipeline.prepare.pack import SUMMARY
from data_pipeline.sources.manifest import open_source
from data_pipeline.transforms.tokenizers import load_tokenizer
from launch.demo import data as demo_data
from launch.demo import documents as demo_text
from launch.demo import scenes as demo_scenes
from launch.demo.data import Settings, is_ready, prepare

ROOT = Path(__file__).resolve().parents[3]
SMALL = Settings(scenes_train=60, scenes_test=20, per_shard=300, documents=40, vocabulary=500, length=32)
IMAGE_PARTS = ("digits", "scenes_real", "scenes_synthetic")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data with its default settings; a copy of what `make demo` generated with the same code, if any."""
    root = tmp_path_factory.mktemp("demo") / "data"
    if is_ready(ROOT / "data" / "demo"):
        shutil.copytree(ROOT / "data" / "demo", root)
    else:
        assert prepare(root)["made"]
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data with the settings SMALL; tests only read it."""
    root = tmp_path_factory.mktemp("small") / "data"
    assert prepare(root, SMALL)["made"]
    return root


def samples(folder: Path) -> list[dict[str, bytes]]:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def pixels(sample: dict[str, bytes]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")).astype(int)


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (demo_data.STAMP, ".lock")
    }


def test_counts(demo: Path) -> None:
    counts = {
        f"{p}/{s}": open_source("a", str(demo / p / s)).samples
        for p in IMAGE_PARTS
        for s in ("train", "test")
    }
    assert counts == {
        "digits/train": 1437,
        "digits/test": 360,
        "scenes_real/train": 5000,
        "scenes_real/test": 320,
        "scenes_synthetic/train": 5000,
        "scenes_synthetic/test": 320,
    }


def test_a_second_call_does_nothing_and_is_quick(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    started = time.perf_counter()
    again = prepare(demo)
    assert time.perf_counter() - started < 0.2
    assert again["made"] is False
    assert again["counts"]["digits"] == {"train": 1437, "test": 360}
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_no_image_is_in_both_splits(demo: Path) -> None:
    seen: dict[bytes, str] = {}
    scenes: dict[str, str] = {}
    for part in IMAGE_PARTS:
        for split in ("train", "test"):
            for sample in samples(demo / part / split):
                where = f"{part}/{split}"
                assert seen.setdefault(sample["jpg"], where) == where
                about = json.loads(sample["json"])
                if part != "digits":
                    scene = f"{about['things']} {about['layout']} {about['background']}"
                    assert scene not in scenes, (scene, where, scenes[scene])
                    scenes[scene] = where


def test_no_document_is_in_both_splits(demo: Path) -> None:
    train = list(refinedweb.documents(str(demo / "refinedweb" / "train")))
    test = list(refinedweb.documents(str(demo / "refinedweb" / "test")))
    assert {text for _, text in train}.isdisjoint(text for _, text in test)
    assert {url for url, _ in train}.isdisjoint(url for url, _ in test)
    assert 0.01 < len(test) / (len(train) + len(test)) < 0.1
    assert sum(len(text) for _, text in train) > 1_000_000


def test_img2dataset_files_agree(demo: Path) -> None:
    for part in IMAGE_PARTS:
        folder = demo / part / "test"
        rows = [
            row for file in sorted(folder.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()
        ]
        found = samples(folder)
        assert [json.loads(sample["json"]) for sample in found] == rows
        assert [sample["__key__"] for sample in found] == [row["key"] for row in rows]
        assert [sample["txt"].decode() for sample in found] == [row["caption"] for row in rows]
        assert {(row["width"], row["height"]) for row in rows} == {(32, 32)}
        assert {Image.open(io.BytesIO(sample["jpg"])).size for sample in found} == {(32, 32)}


def test_digits_are_scikit_learns(demo: Path) -> None:
    from sklearn.datasets import load_digits

    truth = load_digits()
    seen: list[int] = []
    wordings = Counter()
    for split in ("train", "test"):
        for sample in samples(demo / "digits" / split):
            about = json.loads(sample["json"])
            number = int(about["url"].rpartition("/")[2])
            seen.append(number)
            assert about["label"] == str(truth.target[number])
            names = {about["label"], demo_data.WORDS[int(about["label"])]}
            said = names & set(re.findall(r"\w+", about["caption"]))
            assert said, about["caption"]
            wordings[about["caption"].replace(said.pop(), "{}")] += 1
            if number % 50 == 0:
                small = pixels(sample)[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
                assert np.corrcoef(small.ravel(), -truth.images[number].ravel())[0, 1] > 0.97
    assert sorted(seen) == list(range(1797))
    assert len(wordings) == len(demo_data.DIGIT_CAPTIONS)
    assert min(wordings.values()) > 200
    labels = Counter(json.loads(s["json"])["label"] for s in samples(demo / "digits" / "test"))
    assert len(labels) == 10
    assert min(labels.values()) >= 20


def mask(image: np.ndarray, colour: str) -> np.ndarray:
    """Pixels whose nearest named colour is `colour`."""
    palette = {**demo_scenes.COLOURS, **demo_scenes.BACKGROUNDS}
    distance = ((image[:, :, None] - np.array(list(palette.values()))) ** 2).sum(-1)
    return np.asarray(distance.argmin(-1) == list(palette).index(colour))


THING = r"(small|large) (\w+) (circle|square|triangle|cross|ring)"
GROUND = re.compile(r"a (light \w+|\w+) background|background is (light \w+|\w+)\.")
RELATION = re.compile(rf"{THING}(?: is)? (to the left of|to the right of|above|below) a {THING}")


def test_full_sentences_describe_the_picture(demo: Path) -> None:
    """Check the pixels against the words: colours, sizes, positions, background."""
    pairs = singles = 0
    for sample in samples(demo / "scenes_synthetic" / "test"):
        caption, image = sample["txt"].decode(), pixels(sample)
        background = GROUND.search(caption)
        assert background, caption
        assert mask(image, background[1] or background[2]).mean() > 0.3, caption
        found = RELATION.search(caption)
        if not found:
            size, colour, _ = re.search(THING, caption).groups()  # type: ignore[union-attr]
            _, columns = np.nonzero(mask(image, colour))
            width = columns.max() - columns.min() + 1
            assert (width > 11) == (size == "large"), (caption, width)
            singles += 1
            continue
        _, first, _, relation, _, second, _ = found.groups()
        if first == second:
            continue
        here, there = (np.argwhere(mask(image, colour)).mean(0) for colour in (first, second))
        side = {
            "to the left of": there[1] - here[1],
            "to the right of": here[1] - there[1],
            "above": there[0] - here[0],
            "below": here[0] - there[0],
        }
        assert side[relation] > 6, (caption, side)
        pairs += 1
    assert pairs > 150
    assert singles > 20


def test_alt_text_names_every_thing_and_little_else(demo: Path) -> None:
    captions = []
    for sample in samples(demo / "scenes_real" / "test"):
        about = json.loads(sample["json"])
        things = [thing.split() for thing in about["things"].split("; ")]
        for _, colour, shape in things:
            assert f"{colour} {shape}" in about["caption"]
            assert mask(pixels(sample), colour).sum() >= 9, about
        captions.append(about["caption"])
    assert sum("stock photo" in caption for caption in captions) > 5
    alt = np.mean([len(caption) for caption in captions])
    full = np.mean([len(s["txt"]) for s in samples(demo / "scenes_synthetic" / "test")])
    assert alt < 0.6 * full


def test_every_colour_shape_and_size_is_common(demo: Path) -> None:
    for part in ("scenes_real", "scenes_synthetic"):
        words = Counter(
            word
            for file in sorted((demo / part / "train").glob("*.parquet"))
            for things in parquet.read_table(file)["things"].to_pylist()
            for word in re.findall(r"\w+", things)
        )
        assert set(words) == {*demo_scenes.COLOURS, *demo_scenes.SHAPES, *demo_scenes.DIAMETERS}
        assert min(words.values()) > 600


def test_packed_text_is_the_documents(demo: Path) -> None:
    tokenizer = load_tokenizer(str(demo / "tokenizer"))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (2048, 0, 1, 2)
    for split in ("train", "test"):
        summary = json.loads((demo / "text" / split / SUMMARY).read_bytes())
        assert summary["tokens"] == summary["rows"] * 128 + summary["tail_tokens"]
        assert summary["empty_documents"] == 0
        assert open_source("text", str(demo / "text" / split)).tokenizer == tokenizer.fingerprint
    rows = [np.load(io.BytesIO(s["npy"]), allow_pickle=False) for s in samples(demo / "text" / "test")]
    text = tokenizer.decode(np.concatenate(rows).tolist())
    documents = "".join(text for _, text in refinedweb.documents(str(demo / "refinedweb" / "test")))
    assert documents.startswith(text[: len(text) - 20])
    assert len(rows) >= 100


def test_captions_are_short_in_tokens(demo: Path) -> None:
    tokenizer = load_tokenizer(str(demo / "tokenizer"))
    for part, longest in (("digits", 12), ("scenes_real", 20), ("scenes_synthetic", 30)):
        assert (
            max(len(tokenizer.encode(caption)) for caption in demo_data.captions(demo / part / "test"))
            <= longest
        )


def test_reading_the_library_imports_nothing(demo: Path) -> None:
    assert not {"antigravity", "this", "__hello__"} & sys.modules.keys()


def test_two_runs_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    assert prepare(tmp_path / "b", SMALL)["made"]
    first, second = tree(small), tree(tmp_path / "b")
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert not is_ready(small)  # SMALL is not the default
    prepare(tmp_path / "c", Settings(**{**SMALL.__dict__, "seed": 1}))
    changed = [name for name, data in tree(tmp_path / "c").items() if first.get(name) != data]
    assert "scenes_real/train/00000.tar" in changed


def test_an_interrupted_preparation_starts_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(root: Path, settings: Settings) -> dict[str, int]:
        raise KeyboardInterrupt

    root = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setitem(demo_data.WRITERS, "text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(root, SMALL)
    assert not is_ready(root, SMALL)
    assert prepare(root, SMALL)["made"]
    assert is_ready(root, SMALL)
    assert sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) == sorted(
        [*demo_data.PARTS, demo_data.STAMP]
    )
    shard = root / "digits" / "train" / "00001.tar"
    os.truncate(shard, 1000)
    assert not is_ready(root, SMALL)
    shard.unlink()
    assert not is_ready(root, SMALL)
    assert prepare(root, SMALL)["made"]
    assert tree(root) == tree(small)


def test_two_concurrent_calls_generate_the_data_once(tmp_path: Path) -> None:
    made: list[bool] = []
    threads = [
        threading.Thread(target=lambda: made.append(prepare(tmp_path / "demo", SMALL)["made"]))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, True]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds text, but no prepared\.json, so it is not"):
        prepare(tmp_path, SMALL)
    assert (tmp_path / "text" / "thesis.txt").read_text() == "years of work"


def test_docstrings_are_read_from_the_source_and_kept_once(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class A.\n\n    More.\n    """\n'
        '    def f(self, x: int = 1, *, y) -> None:\n        """Method."""\n        def inner(): "Inner."\n'
        'def g():\n    """Method."""\n'
    )
    text = demo_text.module_text(file, "module", set())
    assert text == (
        "module\n\nModule.\n\nclass module.A\n\nClass A.\n\nMore.\n\n"
        "module.A.f(self, x: int=1, *, y)\n\nMethod.\n\nmodule.A.f.inner()\n\nInner."
    )
    file.write_text("def broken(:\n")
    assert demo_text.module_text(file, "module", set()) == ""
