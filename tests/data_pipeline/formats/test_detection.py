"""Format detection for every known layout, and img2dataset's output read back."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_pipeline.errors import UserError
from data_pipeline.formats import detect, img2dataset, refinedweb
from data_pipeline.formats.img2dataset import Outcome, OutcomeCounts, mismatched_key, read_outcomes
from data_pipeline.formats.records import BadRecord
from tests.data_pipeline.formats.test_laion import SCHEMAS, write
from tests.support.samples import write_packed, write_source

TALK = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
ROWS = [
    img2dataset.Row("u0", "zero", b"0", 4, 4),
    img2dataset.Row(
        "u1", "one", None, status="failed_to_download", error_message="HTTP Error 404: Not Found"
    ),
    img2dataset.Row("u2", None, b"2", 4, 4, extension="webp"),
]


def fineweb(path: Path) -> None:
    columns = {
        "text": "words",
        "id": "x",
        "dump": "CC",
        "url": "u",
        "date": "d",
        "file_path": "f",
        "language": "en",
    }
    table = pa.table({k: [v] for k, v in columns.items()} | {"language_score": [0.9], "token_count": [3]})
    parquet.write_table(table, path)


def documents(path: Path) -> None:
    refinedweb.write_documents(str(path), [refinedweb.Document("t")])


def pages(path: Path, length: int) -> None:
    parquet.write_table(pa.table({"url": ["u"] * 3, "text": ["w" * length] * 3}), path)


def text(path: Path, content: str) -> None:
    path.write_text(content)


MAKERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "a folder of tars": ("tars", ".", lambda p: write_source(p, [2])),
    "one tar": ("tars", "00000.tar", lambda p: write_source(p, [2])),
    "a pattern of tars": ("tars", "{00000..00001}.tar", lambda p: write_source(p, [2, 2])),
    "packed text": ("tars", ".", lambda p: write_packed(p, [2])),
    "img2dataset's folder": ("tars", ".", lambda p: img2dataset.write_shard(str(p), 0, ROWS)),
    "img2dataset's parquet": ("img2dataset", "00000.parquet", lambda p: img2dataset.write_shard(str(p), 0, ROWS)),
    "refinedweb": ("refinedweb", ".", lambda p: documents(p / "0.parquet")),
    "fineweb": ("fineweb", ".", lambda p: fineweb(p / "0.parquet")),
    "pages of text and url": ("documents", ".", lambda p: pages(p / "0.parquet", 5000)),
    "captions of text and url": ("pairs", ".", lambda p: pages(p / "0.parquet", 50)),
    "a pattern of parquet": ("fineweb", "{0..0}.parquet", lambda p: fineweb(p / "0.parquet")),
    "parquet by another name": ("fineweb", "data", lambda p: fineweb(p / "data")),
    "cc3m": ("cc3m", "Train_GCC-training.tsv", lambda p: text(p / "Train_GCC-training.tsv", "a\thttp://a\n")),
    "cc3m in a folder": ("cc3m", ".", lambda p: text(p / "val.tsv", "a\thttp://a\n")),
    "cc3m by another name": ("cc3m", "train.txt", lambda p: text(p / "train.txt", "a\thttp://a\n")),
    "llava": ("llava", "a.json", lambda p: text(p / "a.json", json.dumps([TALK]))),
    "llava as lines": ("llava", "a.jsonl", lambda p: text(p / "a.jsonl", json.dumps(TALK))),
    "lines called json": ("llava", "a.json", lambda p: text(p / "a.json", f"{json.dumps(TALK)}\n{json.dumps(TALK)}")),
    "messages": ("messages", ".", lambda p: text(p / "a.json", json.dumps([MESSAGES]))),
    "paligemma": ("paligemma", ".", lambda p: text(p / "a.jsonl", '{"image": "a", "prefix": "b", "suffix": "c"}')),
    "other json": ("unknown-json", "a.json", lambda p: text(p / "a.json", '[{"question": "b"}]')),
    "another table": ("unknown-table", ".", lambda p: parquet.write_table(pa.table({"x": [1]}), p / "0.parquet")),
    **{name: (name, ".", lambda p, s=schema: write(p / "0.parquet", s)) for name, schema in SCHEMAS.items()},
}  # fmt: skip


@pytest.mark.parametrize("what", MAKERS)
def test_what_a_path_is(what: str, tmp_path: Path) -> None:
    name, path, make = MAKERS[what]
    make(tmp_path)
    found = detect(str(tmp_path / path) if path != "." else str(tmp_path))
    assert found.name == name
    assert found.files
    assert all(Path(file).is_file() for file in found.files)


def test_tars_come_before_the_tables_beside_them(tmp_path: Path) -> None:
    img2dataset.write_shard(str(tmp_path), 0, ROWS)
    (tmp_path / "notes.json").write_text("[]")
    assert detect(str(tmp_path)).files == (str(tmp_path / "00000.tar"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"a\.jsonl is compressed with gzip; decompress it"),
        ("a.bin", b"\x00\x01\x02", r"a\.bin begins with .* which is not one of: tars of webdataset"),
        ("a.csv", b"caption,url\n", r"is not one of"),
    ],
)
def test_what_is_none_of_them(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        detect(str(tmp_path / name))


def test_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        detect(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"a\.tsv does not exist"):
        detect(str(tmp_path / "a.tsv"))
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        detect(str(tmp_path))


def test_the_rows_of_img2dataset_are_read_back(tmp_path: Path) -> None:
    img2dataset.write_shard(str(tmp_path), 3, ROWS, digits=6)
    found = list(read_outcomes(str(tmp_path)))
    assert found == [
        Outcome("0000030000", "success", "", "u0", "zero", 4, 4),
        Outcome("0000030001", "failed_to_download", "HTTP Error 404: Not Found", "u1", "one", None, None),
        Outcome("0000030002", "success", "", "u2", None, 4, 4),
    ]
    counts = OutcomeCounts()
    for outcome in found:
        counts.add(outcome)
    assert (counts.rows, counts.successes, dict(counts.failures)) == (
        3,
        2,
        {"failed_to_download: HTTP Error 404: Not Found": 1},
    )


def test_rows_without_key_or_status_are_bad_records(tmp_path: Path) -> None:
    table = pa.table(
        {
            "key": ["0", None, "2"],
            "status": ["success", "success", None],
            "error_message": pa.array([None, None, None], pa.string()),
            "width": [4.0, float("nan"), None],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second, third = read_outcomes(str(tmp_path))
    assert isinstance(first, Outcome)
    assert isinstance(second, BadRecord)
    assert isinstance(third, BadRecord)
    assert (first.width, second.reason, third.reason) == (4, "missing key", "missing status")


@pytest.mark.parametrize(
    ("stem", "keys", "odd"),
    [
        ("00002", ["000020000", "000020007"], None),
        ("000012", ["0000120000"], None),
        ("00002", ["000020000", "000030001"], "key 000030001 does not belong to shard 00002"),
        ("00002", ["abc"], "key abc does not belong to shard 00002"),
        ("photos", ["abc"], None),
    ],
)
def test_keys_begin_with_the_shards_number(stem: str, keys: list[str], odd: str | None) -> None:
    assert mismatched_key(stem, keys) == odd
