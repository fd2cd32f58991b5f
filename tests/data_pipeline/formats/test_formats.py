"""img2dataset and RefinedWeb: our files read by pyarrow and webdataset, and files of other writers read by us."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import webdataset

from data_pipeline.errors import UserError
from data_pipeline.formats import img2dataset, refinedweb
from data_pipeline.sources.manifest import open_source

# In img2dataset's order: the extra columns, caption and url, then the columns that it adds.
COLUMNS = [
    "label", "caption", "url", "key", "status", "error_message", "width", "height", "original_width",
    "original_height", "exif", "sha256",
]  # fmt: skip


def row(number: int, **changes: object) -> img2dataset.Row:
    values = {
        "url": f"http://x/{number}.jpg",
        "caption": f"caption {number}",
        "image": b"image" * number,
        "width": 32,
        "height": 24,
        "original_width": 640,
        "extra": {"label": str(number)},
    }
    return img2dataset.Row(**{**values, **changes})  # type: ignore[arg-type]


ROWS = [
    row(1),
    row(2, image=None, status="failed_to_download", error_message="HTTP Error 404: Not Found", width=None, height=None,
        original_width=None),
    row(3, extension="png", caption=None),
    row(4, image=None, status="failed_to_resize", error_message="image too small", width=None, height=None,
        original_width=None),
    row(5, extension="webp", caption="ünï"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    img2dataset.write_shard(str(tmp_path), 2, ROWS)
    return tmp_path


def test_three_files_a_shard(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["00002.parquet", "00002.tar", "00002_stats.json"]


def test_the_tar_holds_the_successes_alone(folder: Path) -> None:
    samples = list(webdataset.WebDataset(str(folder / "00002.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["000020000", "000020002", "000020004"]
    assert [s.get("jpg") or s.get("png") or s.get("webp") for s in samples] == [
        b"image" * n for n in (1, 3, 5)
    ]
    assert [s.get("txt") for s in samples] == [b"caption 1", None, "ünï".encode()]


def test_the_parquet_holds_every_row_and_agrees_with_the_json(folder: Path) -> None:
    table = parquet.read_table(folder / "00002.parquet")
    assert table.schema.names == COLUMNS
    assert {table.schema.field(n).type for n in ("width", "height", "original_width", "original_height")} == {
        pa.int32()
    }
    assert {table.schema.field(n).type for n in ("caption", "url", "key", "status", "exif", "sha256")} == {
        pa.string()
    }
    rows = table.to_pylist()
    assert [r["key"] for r in rows] == [f"00002000{n}" for n in range(5)]
    assert [r["status"] for r in rows] == [r.status for r in ROWS]
    assert rows[0]["original_height"] == rows[0]["height"] == 24
    assert rows[0]["sha256"] == hashlib.sha256(b"image").hexdigest()
    assert rows[1]["sha256"] is rows[1]["width"] is rows[1]["exif"] is None
    by_key = {r["key"]: r for r in rows}
    for sample in webdataset.WebDataset(str(folder / "00002.tar"), shardshuffle=False):
        assert json.loads(sample["json"]) == by_key[sample["__key__"]]
        assert list(json.loads(sample["json"])) == COLUMNS
        assert sample["json"].startswith(b'{\n    "label"')


def test_the_statistics_count_every_row(folder: Path) -> None:
    stats = json.loads((folder / "00002_stats.json").read_bytes())
    assert stats == {
        "count": 5,
        "successes": 3,
        "failed_to_download": 1,
        "failed_to_resize": 1,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"HTTP Error 404: Not Found": 1, "image too small": 1, "success": 3},
    }
    assert open_source("a", str(folder)).counts.tolist() == [3]


def test_a_writer_that_fails_leaves_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="status 'success' contradicts a row with no image"):
        img2dataset.write_shard(str(tmp_path), 0, [row(1), row(2, image=None)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shard", "index", "per_shard", "digits", "key"),
    [
        (0, 0, 10_000, 5, "000000000"),
        (12, 345, 10_000, 5, "000120345"),
        (3, 7, 1000, 5, "00003007"),
        (1, 2, 10_000, 6, "0000010002"),
    ],
)
def test_keys(shard: int, index: int, per_shard: int, digits: int, key: str) -> None:
    assert img2dataset.sample_key(shard, index, per_shard, digits) == key


DOCUMENTS = [
    refinedweb.Document("First text.", "http://a", datetime.datetime(2013, 5, 18, 10, 42), "CC-MAIN-2013-20", "1368",
                        (("http://a/i.png", "alt"),)),
    refinedweb.Document("Zweiter\n\nText."),
]  # fmt: skip


def test_refinedweb_has_the_public_schema(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    refinedweb.write_documents(str(path), DOCUMENTS)
    table = parquet.read_table(path)
    described = {f.name: str(f.type).replace("element", "item") for f in table.schema}
    assert described == {
        "content": "string",
        "url": "string",
        "timestamp": "timestamp[ns]",
        "dump": "string",
        "segment": "string",
        "image_urls": "list<item: list<item: string>>",
    }
    assert table["image_urls"].to_pylist() == [[["http://a/i.png", "alt"]], []]
    assert table["timestamp"].to_pylist()[0] == datetime.datetime(2013, 5, 18, 10, 42)
    assert list(refinedweb.documents(str(path))) == [("http://a", "First text."), ("", "Zweiter\n\nText.")]


def test_documents_come_in_the_files_order_whatever_the_layout(tmp_path: Path) -> None:
    truth = [(f"u{n}", f"text {n}") for n in range(50)]
    for number, (start, stop) in enumerate([(0, 20), (20, 21), (21, 50)]):
        part = truth[start:stop]
        table = pa.table(
            {"content": [t for _, t in part], "other": list(range(start, stop)), "url": [u for u, _ in part]}
        )
        parquet.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=4)
    for rows in (1, 3, 1024):
        assert list(refinedweb.documents(str(tmp_path), rows)) == truth


def test_derived_sets_are_read(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", None], pa.large_string()), "id": ["1", "2"]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert list(refinedweb.documents(str(tmp_path))) == [("", "a"), ("", "")]


def test_bad_documents_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        list(refinedweb.documents(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"holds no \.parquet files"):
        list(refinedweb.documents(str(tmp_path)))
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["a"], "url": ["u"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet has no column content or text, only body, url"):
        list(refinedweb.documents(str(tmp_path)))
    refinedweb.write_documents(str(path), DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"a\.parquet is not a parquet file, or cut off"):
        list(refinedweb.documents(str(tmp_path)))
