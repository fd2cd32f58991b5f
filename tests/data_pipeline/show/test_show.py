"""`dromos data show` on tars and documents: counts, problems, notes, and the layout of the terminal lines."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import storage
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import UserError
from data_pipeline.formats import img2dataset, refinedweb
from data_pipeline.index.build import build_index
from data_pipeline.show import describe, render
from data_pipeline.sources.tar import TarWriter
from data_pipeline.transforms.decode import ImageSpec
from tests.support.samples import encode, pixels


def rows(count: int) -> list[img2dataset.Row]:
    picture = encode(pixels(0, 0, 4, 4), "JPEG")
    return [img2dataset.Row(f"u{n}", f"caption [bold]{n}", picture, 4, 4) for n in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for shard, count in enumerate([3, 4]):
        img2dataset.write_shard(str(tmp_path / "s"), shard, rows(count))
    return str(tmp_path / "s")


def shown(about: dict[str, object]) -> str:
    return "\n".join(line for _, line in render(about, 140))


def test_a_good_source(folder: str) -> None:
    about = describe(folder, first=2)
    json.dumps(about)
    assert {k: about[k] for k in ("kind", "shards", "samples", "counted_by", "problems")} == {
        "kind": "img2dataset",
        "shards": 2,
        "samples": 7,
        "counted_by": "stats",
        "problems": [],
    }
    assert about["members"] == {"jpg": 7, "json": 7, "txt": 7}
    assert [(s["key"], s["caption"]) for s in about["first"]] == [
        ("000000000", "caption [bold]0"),
        ("000000001", "caption [bold]1"),
    ]
    text = shown(about)
    assert "caption [bold]0" in text  # captions are not markup
    assert "problem: " not in text
    assert "_stats.json" in text
    build_index(folder)
    assert describe(folder)["counted_by"] == "manifest"
    assert "the index" in shown(describe(folder))


def test_few_shards_of_many_are_examined(tmp_path: Path) -> None:
    for shard in range(40):
        img2dataset.write_shard(str(tmp_path), shard, rows(2))
    about = describe(str(tmp_path), examine=8)
    assert about["samples"] == 80
    assert about["examined"] == {"shards": 8, "samples": 16}
    assert "in 8 of 40 shards" in shown(about)


def test_problems_are_reported(folder: str) -> None:
    stats = f"{folder}/00001_stats.json"
    storage.publish(stats, json.dumps({"count": 9, "successes": 9}).encode())
    (problem,) = describe(folder)["problems"]
    assert "00001.tar holds 4 samples" in problem
    assert "says 9" in problem
    assert "problem: " in shown(describe(folder))
    Path(stats).unlink()
    assert any("has no 00001_stats.json" in problem for problem in describe(folder)["problems"])
    tar = Path(folder) / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    about = describe(folder)
    assert about["samples"] is None
    assert any("00001.tar is cut off" in problem for problem in about["problems"])
    assert "unknown" in shown(about)


def test_samples_without_image_or_caption(tmp_path: Path) -> None:
    with TarWriter(tmp_path / "0.tar") as tar:
        tar.write("a", {"png": encode(pixels(0, 0)), "txt": b"a dot"})
        tar.write("b", {"txt": b"a dot"})
        tar.write("c", {"png": encode(pixels(0, 1))})
    about = describe(str(tmp_path))
    assert about["kind"] == "webdataset tars"
    assert about["problems"] == [
        "1 of 3 samples examined have no image member (jpg/jpeg/png/webp/gif/bmp); the first is b",
        "1 of 3 samples examined have no member for a caption (txt or json); the first is c",
        "2 of 3 (66.7 %) samples decoded are unusable: missing image 1, missing caption 1; the first is b in "
        f"{tmp_path}/0.tar. Training replaces such samples; write them again or leave them out",
    ]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "gif", "bmp"])
def test_a_sample_that_training_serves_is_no_problem(tmp_path: Path, extension: str) -> None:
    data = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(extension, extension.upper())
    Image.new("RGB", (8, 8), "red").save(data, kind)
    with TarWriter(tmp_path / "0.tar") as tar:
        tar.write("a", {extension: data.getvalue(), "txt": b"red"})
    about = describe(str(tmp_path))
    assert (about["kind"], about["problems"]) == ("webdataset tars", [])
    spec = StreamSpec("pairs", 0, {"a": SourceSpec(str(tmp_path))}, batch=1, image=ImageSpec(size=8))
    images = BatchBuilder(spec).make(0, 0, 1).images
    assert images is not None
    assert images[0, 0].mean() > 240


def test_damaged_documents_are_a_problem_that_names_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        texts = [rng.bytes(300).hex() for _ in range(50)]
        refinedweb.write_documents(
            str(tmp_path / f"{name}.parquet"), [refinedweb.Document(text, "u") for text in texts]
        )
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    about = describe(str(tmp_path), first=2)
    assert [sample["key"] for sample in about["first"]] == ["u", "u"]
    assert about["samples"] is None
    (problem,) = about["problems"]
    assert "b.parquet is not a parquet file, or cut off" in problem
    assert "unknown" in shown(about)
    # The file's end, which is read first, is whole; the columns are not.
    (tmp_path / "b.parquet").write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    (problem,) = describe(str(tmp_path))["problems"]
    assert "b.parquet is not a parquet file, or cut off" in problem
    (tmp_path / "a.parquet").unlink()
    assert "b.parquet is not a parquet file, or cut off" in describe(str(tmp_path))["problems"][0]
    with pytest.raises(UserError, match="does not exist"):
        describe(str(tmp_path / "c.parquet"))


def test_lines_keep_to_the_width_and_captions_to_their_column(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(12)]
    with TarWriter(tmp_path / "0.tar") as tar:
        tar.write("a", {"jpg": b"", "txt": " ".join(words).encode()})
        tar.write("folder/" + "k" * 60, {"jpg": b"", "txt": b"\x1b[31mred\ncaption"})
    about = describe(str(tmp_path))
    lines = [line for kind, line in render(about, 60) if kind == "plain"]
    assert max(map(len, lines)) <= 67  # the key alone is longer than the width
    start = next(n for n, line in enumerate(lines) if line.split()[:1] == ["sample"])
    column = lines[start].index("caption")
    body = lines[start + 1 :]
    assert [line[:column].strip() for line in body] == ["a", "", "", ("folder/" + "k" * 60)[:column], ""]
    assert " ".join(line[column:] for line in body[:3]).split() == words
    assert body[-1][column:] == " [31mred caption"  # no control characters reach the terminal
    assert all(letter.isprintable() for line in lines for letter in line)


def test_documents_and_packed_text(tmp_path: Path) -> None:
    documents = [refinedweb.Document(f"text {n}\nof it", f"u{n}") for n in range(9)]
    refinedweb.write_documents(str(tmp_path / "0.parquet"), documents)
    about = describe(str(tmp_path), first=3)
    assert (about["kind"], about["samples"], about["problems"]) == ("RefinedWeb documents", 9, [])
    assert about["first"][2] == {"key": "u2", "caption": "text 2 of it"}
    listed = [(c["name"], c["meaning"], c["missing"]) for c in about["columns"]]
    assert listed[:3] == [("content", "text", 0.0), ("url", "url", 0.0), ("timestamp", "time", None)]
    assert "content     string" in shown(about)


def test_a_source_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        describe(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        describe(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        describe(str(tmp_path / "{0..3}.tar"))


def test_a_tar_without_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("notes.md"))
    assert describe(str(tmp_path))["kind"] == "tars without images"
    assert "no image member" in describe(str(tmp_path))["problems"][0]
