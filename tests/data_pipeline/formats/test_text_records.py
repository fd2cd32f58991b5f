"""CC3M's lines and JSON records, from ordinary and from hostile files, against csv and json."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.formats import cc3m, text_records
from data_pipeline.formats.laion import Pair
from data_pipeline.formats.records import BadRecord
from data_pipeline.formats.text_records import lines


def tsv(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "Train_GCC-training.tsv").write_bytes(content)
    return str(tmp_path / "Train_GCC-training.tsv")


GOOD = [('a "quoted" dot', "http://a/1"), ("it's , and ; é", "http://a/2?x=1,2"), ("x", "http://a/3")]


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_pairs_are_those_of_a_plain_reader_of_tabs(header: bool, end: bytes, tmp_path: Path) -> None:
    path = str(tmp_path / "a.tsv")
    cc3m.write_pairs(path, GOOD, header)
    content = Path(path).read_bytes().replace(b"\n", end)
    rows = list(csv.reader(io.StringIO(content.decode()), delimiter="\t", quoting=csv.QUOTE_NONE))[header:]
    found = [pair for pair in cc3m.read_pairs(tsv(tmp_path, content)) if isinstance(pair, Pair)]
    assert [[pair.captions[0], pair.url] for pair in found] == rows == [list(pair) for pair in GOOD]


def test_bad_lines_are_counted_where_they_stand(tmp_path: Path) -> None:
    content = b"one\thttp://1\nno tab\na\tb\tc\n\n\xff\xfe\thttp://2\nno url\t \n\thttp://3\nlast\thttp://4"
    found = list(cc3m.read_pairs(tsv(tmp_path, content)))
    found_records = [(r.place, r.reason) if isinstance(r, BadRecord) else (r.url, r.captions) for r in found]
    assert found_records == [
        ("http://1", ("one",)),
        ("line 2", "no tab"),
        ("line 3", "more than two columns"),
        ("line 5", "not UTF-8"),
        ("line 6", "missing url"),
        ("http://3", ()),
        ("http://4", ("last",)),
    ]


def test_a_header_further_down_is_a_line(tmp_path: Path) -> None:
    found = list(cc3m.read_pairs(tsv(tmp_path, b"a\thttp://1\ncaption\turl\n")))
    assert [pair.url for pair in found if isinstance(pair, Pair)] == ["http://1", "url"]


def test_a_long_line_is_skipped_in_little_memory(tmp_path: Path) -> None:
    long = b"x" * (10 << 20)
    path = tsv(tmp_path, b"a\thttp://1\n" + long * 3 + b"\nb\thttp://2\n")
    tracemalloc.start()
    found = list(cc3m.read_pairs(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    first, second, third = found
    assert isinstance(second, BadRecord)
    assert (second.place, second.reason) == ("line 2", "line too long")
    assert isinstance(third, Pair)
    assert third.url == "http://2"
    assert isinstance(first, Pair)
    assert most < 20 << 20


def test_binary_bytes_are_bad_records(tmp_path: Path) -> None:
    found = list(cc3m.read_pairs(tsv(tmp_path, bytes(range(256)) * 50)))
    assert found
    assert all(isinstance(one, BadRecord) for one in found)


def test_swapped_columns_are_noticed() -> None:
    good = [Pair(url, (caption,)) for caption, url in GOOD]
    assert not cc3m.is_swapped(good)
    assert cc3m.is_swapped([Pair(pair.captions[0], (pair.url,)) for pair in good])
    assert not cc3m.is_swapped([])


@given(st.lists(st.binary(max_size=20)), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_lines_are_those_of_a_split(parts: list[bytes], longest: int) -> None:
    content = b"\n".join(parts)
    wanted = content.split(b"\n")
    if wanted[-1] == b"":
        wanted.pop()
    wanted = [one.rstrip(b"\r") for one in wanted]
    found = list(lines(io.BytesIO(content), longest))
    assert [number for number, _ in found] == list(range(1, len(wanted) + 1))
    for (_, line), truth in zip(found, wanted, strict=True):
        if line is None:
            assert len(truth) > longest - 2  # line ends beside the limit are counted with it
        else:
            assert line == truth


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.lists(VALUES, max_size=8),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from([1, 2, 5, 33, 4096]),
)
@settings(max_examples=300, deadline=None)
def test_entries_of_a_list_are_those_that_json_loads(
    values: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    truth = json.loads(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_records, "CHUNK_BYTES", chunk)
        data = text.encode("utf-8", "surrogatepass")
        if not ascii_only and any(0xD800 <= ord(letter) < 0xE000 for letter in text):
            return
        found = list(text_records.records("f", io.BytesIO(data)))
    assert [place for place, _ in found] == [f"entry {n}" for n in range(len(truth))]
    assert [value for _, value in found] == truth


def reasons(content: bytes, longest: int = 1 << 20) -> list[Any]:
    found = text_records.records("f", io.BytesIO(content), longest)
    return [(place, v.reason) if isinstance(v, BadRecord) else v for place, v in found]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"[]", []),
        (b"\xef\xbb\xbf [ 1 , 2 ]\n", [1, 2]),
        (b'[{"a": 1}', [{"a": 1}, ("entry 1", "bad json")]),
        (b"[1, 2", [1, 2, ("entry 2", "bad json")]),
        (b'[{"a": 1} {"b": 2}]', [{"a": 1}, ("entry 1", "bad json")]),
        (b'[{"a": }, 1]', [("entry 0", "bad json")]),
        (b"[1] [2]", [1, ("entry 1", "bad json")]),
        (b'["' + b"x" * 100_000, [("entry 0", "bad json")]),
        (b"[" * 200_000, [("entry 0", "nested too deeply")]),
        (b'{"a":' * 200_000, [("line 1", "nested too deeply")]),
        (b'{"a": 1}\n\n{bad\n\xff\n{"b": 2}', [{"a": 1}, ("line 3", "bad json"), ("line 4", "not UTF-8"), {"b": 2}]),
        (b'{"a": 1}\n"' + b"x" * (10 << 20) + b'"\n{"b": 2}\n', [{"a": 1}, ("line 2", "record too long"), {"b": 2}]),
        (b'[{"a": "' + b"x" * (10 << 20) + b'"}]', [("entry 0", "record too long")]),
    ],
)  # fmt: skip
def test_hostile_json_ends_in_bad_records(content: bytes, expected: list[Any]) -> None:
    assert reasons(content) == expected


def test_a_large_list_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[" + ",\n".join(json.dumps({"id": n, "text": "y" * 900}) for n in range(30_000)) + "]")
    assert path.stat().st_size > 25 << 20
    tracemalloc.start()
    with path.open("rb") as opened:
        total = sum(value["id"] for _, value in text_records.records(str(path), opened))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == sum(range(30_000))
    assert most < 6 << 20
