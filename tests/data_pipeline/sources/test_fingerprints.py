"""Fingerprints of sources, indexes, views and scans: an ingredient changes them or is refused, a place does not."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.index.build import build_index
from data_pipeline.index.build_view import Rule, build_view
from data_pipeline.index.shard_record import ShardRecord, from_table, to_table
from data_pipeline.sources.manifest import Manifest, digest_of, fingerprint, open_source
from data_pipeline.sources.offset_file import check_of
from data_pipeline.sources.scan import scan
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import TarWriter
from data_pipeline.sources.views import NUMBER_COLUMNS
from data_pipeline.storage.parquet_table import digest
from data_pipeline.transforms.tokenizers import JsonTokenizer
from tests.support.ingredients import assert_distinct, assert_each_changes


def print_of(paths: list[str], counts: list[int], sizes: list[int], tokenizer: str | None) -> str:
    return fingerprint(paths, np.array(counts, np.int64), np.array(sizes, np.int64), tokenizer)


def test_a_source_is_its_paths_counts_sizes_and_tokenizer() -> None:
    base = {"paths": ["a.tar", "b.tar"], "counts": [3, 45], "sizes": [1024, 2048], "tokenizer": None}
    others = [
        ("paths", ["a.tar", "c.tar"]), ("paths", ["b.tar", "a.tar"]), ("paths", ["a.tarb.tar", ""]),
        ("paths", ["x/a.tar", "b.tar"]), ("paths", ["caf\udce9.tar", "b.tar"]),
        ("counts", [3, 46]), ("counts", [45, 3]), ("counts", [34, 5]), ("counts", [2, 46]), ("counts", [3, 0]),
        ("sizes", [1024, 2049]), ("sizes", [2048, 1024]), ("sizes", [10242, 48]),
        ("tokenizer", "0a"), ("tokenizer", "a0"),
    ]  # fmt: skip
    assert_each_changes(print_of, base, others)
    # Digits that move from a count to its size; a shard without samples more; one shard less.
    assert_distinct(
        [
            ("12 and 3", print_of(["a"], [12], [3], None)),
            ("1 and 23", print_of(["a"], [1], [23], None)),
            ("an empty shard", print_of(["a", "b"], [12, 0], [3, 1024], None)),
            ("two shards", print_of(["a", "b"], [1, 2], [3, 4], None)),
            ("their order", print_of(["b", "a"], [2, 1], [4, 3], None)),
            ("its digits in the path", print_of(["a\012"], [3], [0], None)),
        ]
    )


def test_the_fingerprint_of_a_source_stays_that_of_older_checkpoints() -> None:
    """It is compared on resume, so another value would refuse every run of an older version."""
    text = b"a.tar\x003\x001024\nb/\xc3\xbc.tar\x0045\x002048\ntokenizer\x0000ff"
    found = print_of(["a.tar", "b/ü.tar"], [3, 45], [1024, 2048], "00ff")
    assert found == xxhash.xxh64_hexdigest(text) == "eba260a527cbf5eb"


def fill(root: Path, text: bytes = b"a") -> Path:
    for shard, count in enumerate([3, 2]):
        with TarWriter(root / f"{shard}.tar") as tar:
            for index in range(count):
                tar.write(f"{shard}{index}", {"txt": text, "cls": b"1"})
    return root


def test_neither_place_nor_time_nor_content_of_the_same_size_is_part_of_it(tmp_path: Path) -> None:
    want = open_source("a", str(fill(tmp_path / "one"))).fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deep")
    for path in (tmp_path / "two" / "deep").iterdir():
        os.utime(path, (1, 1))
    assert open_source("b", str(tmp_path / "two" / "deep")).fingerprint == want
    assert open_source("b", f"file://{tmp_path}/two/deep/").fingerprint == want
    assert open_source("b", str(fill(tmp_path / "three", b"b"))).fingerprint == want


INDEX_COLUMNS = {"path": pa.string(), "count": pa.int64(), "size": pa.int64(), "width": pa.uint8(),
                 "check": pa.uint64(), "block": pa.int64()}  # fmt: skip


def test_an_index_digest_has_every_column_that_order_and_ranges_depend_on() -> None:
    def key(tokenizer: str, **columns: list[Any]) -> str:
        return digest_of(pa.table({k: pa.array(v, INDEX_COLUMNS[k]) for k, v in columns.items()}), tokenizer)

    base = {"path": ["a", "bc"], "count": [1, 2], "size": [3, 4], "width": [2, 4], "check": [5, 6], "block": [0, 8],
            "tokenizer": "t"}  # fmt: skip
    others: list[tuple[str, Any]] = [
        ("path", ["ab", "c"]),
        ("path", ["bc", "a"]),
        ("tokenizer", ""),
        ("tokenizer", "u"),
    ]
    for name in ("count", "size", "width", "check", "block"):
        values = base[name]
        assert isinstance(values, list)
        others += [
            (name, values[::-1]),
            (name, [values[0], values[1] + 1]),
            (name, [values[0] + 1, values[1]]),
        ]
    assert_each_changes(key, base, others)


def test_the_digest_of_an_index_stays_that_of_the_files_on_disks() -> None:
    """Paths and tokenizer between NULs, then each column as it is stored: another rule would refuse every index."""
    numbers = {"count": [1, 2], "size": [3, 4], "width": [2, 4], "check": [5, 2**63], "block": [0, 8]}
    table = pa.table({"path": ["a", "b"]} | {k: pa.array(v, INDEX_COLUMNS[k]) for k, v in numbers.items()})
    stored = struct.pack("<2q2q2B2Q2q", *(value for column in numbers.values() for value in column))
    assert digest_of(table, "t") == xxhash.xxh64_hexdigest(b"a\0b\0t" + stored)
    views = pa.table({"path": ["a", "b"], "count": [1, 2], "size": [3, 4], "kept": [1, 0], "block": [0, 8]})
    stored = struct.pack("<8q", 1, 2, 3, 4, 1, 0, 0, 8)
    assert digest(views, NUMBER_COLUMNS, "v.bits") == xxhash.xxh64_hexdigest(b"a\0b\0v.bits" + stored)


def edited(url: str, column: str, value: Any) -> None:
    """Replace a column's last value, or a text of the schema, in a parquet file; everything else stays."""
    table = parquet.read_table(url)
    metadata = dict(table.schema.metadata)
    if column.encode() in metadata:
        table = table.replace_schema_metadata(metadata | {column.encode(): value.encode()})
    else:
        number = table.schema.get_field_index(column)
        values = table[column].to_pylist()
        changed = pa.array([*values[:-1], value], table.schema.field(column).type)
        table = table.set_column(number, table.schema.field(column), changed)
    storage.publish_table(url, table)


@pytest.mark.parametrize(
    ("column", "value"),
    [("path", "2.tar"), ("count", 3), ("size", 10_241), ("width", 4), ("check", 7), ("block", 0), ("tokenizer", "t"),
     ("digest", "0" * 16)],
)  # fmt: skip
def test_an_index_with_one_other_value_is_refused(tmp_path: Path, column: str, value: Any) -> None:
    build_index(str(fill(tmp_path)))
    edited(f"{tmp_path}/_index/shards.parquet", column, value)
    with pytest.raises(
        UserError, match=r"is not a valid index .*does not match its digest.*dromos data index"
    ):
        open_source("a", str(tmp_path))


def test_an_index_that_names_the_offsets_of_other_tars_is_refused(tmp_path: Path) -> None:
    build_index(str(fill(tmp_path / "a")))
    build_index(str(fill(tmp_path / "b", b"b" * 600)))
    table = f"{tmp_path}/a/_index/shards.parquet"
    (other,) = (tmp_path / "b" / "_index").glob("offsets-*.bin")
    shutil.copy(other, tmp_path / "a" / "_index")
    edited(table, "offsets", other.name)
    with pytest.raises(UserError, match=r"is damaged or does not belong to the shards\.parquet beside it"):
        ShardReader(open_source("a", f"{tmp_path}/a")).read(0, 1)


def test_a_block_check_has_the_bytes_and_the_count() -> None:
    assert_each_changes(
        lambda block, samples: check_of(block, samples),
        {"block": b"abcd", "samples": 3},
        [("block", b"abce"), ("block", b"abc"), ("block", b"abcd\0"), ("samples", 4), ("samples", 0)],
    )


def record(**changes: Any) -> ShardRecord:
    base = ShardRecord("a.tar", 3, 1024, "17", 2, 2**63 + 5, "00ff", '{"jpg": 3}', 0, "[]")
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("known", "size", "version", "valid"),
    [
        ("17", 1024, "17", True),
        ("17", 1025, "17", False),
        ("17", 1024, "18", False),
        ("17", 1024, "", False),
        ("", 1024, "", False),  # a store without ETags: nothing proves that the shard is unchanged
        ("", 1024, "17", False),
    ],
)
def test_a_record_is_valid_for_its_size_and_version(known: str, size: int, version: str, valid: bool) -> None:
    assert record(version=known).matches(size, version) is valid
    (read,) = from_table(to_table([record(version=known)]))
    assert read == record(version=known)


def test_a_tar_changed_in_place_is_scanned_again(tmp_path: Path) -> None:
    """Same size, same name: only the time of the change tells, to the nanosecond."""
    build_index(str(fill(tmp_path)))
    status = os.stat(tmp_path / "1.tar")
    for step in (0, 1, -1, 10**9):
        os.utime(tmp_path / "1.tar", ns=(status.st_atime_ns, status.st_mtime_ns + step))
        assert build_index(str(tmp_path)).scanned == (step != 0)


def tar_of(*members: tuple[str, int]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    return out.getvalue()


def test_a_scan_is_names_sizes_and_offsets_of_all_members() -> None:
    tars = {
        "base": tar_of(("a.jpg", 600), ("b.jpg", 7)),
        "a name": tar_of(("a.jpg", 600), ("c.jpg", 7)),
        "an extension": tar_of(("a.png", 600), ("b.jpg", 7)),
        "the last size": tar_of(("a.jpg", 600), ("b.jpg", 8)),
        "the first size": tar_of(("a.jpg", 601), ("b.jpg", 7)),
        "sizes in another order": tar_of(("a.jpg", 7), ("b.jpg", 600)),
        "names in another order": tar_of(("b.jpg", 600), ("a.jpg", 7)),
        "two folders": tar_of(("a.jpg", 600), ("b/c.jpg", 7)),
        "a moved boundary": tar_of(("a.jpgb", 600), ("/c.jpg", 7)),
        "one member less": tar_of(("a.jpg", 600)),
        "an offset": tar_of(("a.jpg", 600), ("README", 0), ("b.jpg", 7)),
    }
    assert_distinct([(name, scan(data, name).fingerprint) for name, data in tars.items()])
    assert scan(tars["base"], "x").fingerprint == scan(tars["base"], "y").fingerprint


def view_of(tmp_path: Path, kept: list[str]) -> tuple[Manifest, Manifest]:
    (tmp_path / "ids.txt").write_text("\n".join(kept))
    build_view(str(tmp_path / "s"), "v", Rule(ids=str(tmp_path / "ids.txt")))
    return open_source("a", str(tmp_path / "s")), open_source("a", str(tmp_path / "s"), "v")


def test_a_view_is_its_source_and_its_samples(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    found = {}
    for kept in (["00"], ["01"], ["00", "01"], ["10"], ["00", "01", "02", "10", "11"]):
        whole, view = view_of(tmp_path, kept)
        found[" ".join(kept)] = view.fingerprint
    other = dataclasses.replace(whole, fingerprint="0" * 16).with_view("v")
    assert_distinct([*found.items(), ("the whole", whole.fingerprint), ("another source", other.fingerprint)])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("path", "2.tar"),
        ("count", 3),
        ("size", 10_241),
        ("kept", 1),
        ("block", 0),
        ("bits", "v-0123456789abcdef.bits"),
    ],
)
def test_a_view_with_one_other_value_is_refused(tmp_path: Path, column: str, value: Any) -> None:
    fill(tmp_path / "s")
    view_of(tmp_path, ["00", "10", "11"])
    edited(f"{tmp_path}/s/_index/views/v.parquet", column, value)
    with pytest.raises(UserError, match=r"is not a valid view .*dromos data view"):
        open_source("a", str(tmp_path / "s"), "v")


def test_a_tokenizer_is_its_file_and_its_special_tokens() -> None:
    from tokenizers import Tokenizer, models

    def key(words: list[str], start: int, end: int, pad: int) -> str:
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
        return JsonTokenizer(made.to_str(), start, end, pad).fingerprint

    base = {"words": ["a", "b"], "start": 1, "end": 23, "pad": 4}
    assert_each_changes(
        key, base, [("words", ["b", "a"]), ("words", ["a", "b", "c"]), ("start", 2), ("end", 3), ("pad", 1)]
    )
    assert key(["a"], 1, 23, 4) != key(["a"], 12, 3, 4) != key(["a"], 1, 2, 34)
