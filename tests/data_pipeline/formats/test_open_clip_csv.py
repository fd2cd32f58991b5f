"""Captions in TSVs with headers: the columns are those that the header names, against pandas' own writing."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.formats import cc3m, detect
from data_pipeline.formats.laion import Pair
from data_pipeline.formats.records import BadRecord
from data_pipeline.show import describe

ROWS = [("images/a b.jpg", "a red disc"), ("/data/2.PNG", 'a "quoted" dot'), ("3.webp", "é, ; 一")]


def written(header: list[str], rows: list[list[str]]) -> str:
    """As `DataFrame.to_csv(sep="\\t")` writes them: quotes where they are needed."""
    out = io.StringIO()
    csv.writer(out, delimiter="\t", lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train"])
@pytest.mark.parametrize(
    ("header", "order"),
    [
        (["filepath", "title"], "pc"),  # open_clip's default
        (["title", "filepath"], "cp"),
        (["", "filepath", "title"], "-pc"),  # with pandas' index
        (["Image", "id", "Caption"], "p-c"),
    ],
)
def test_the_header_says_which_columns_are_read(
    header: list[str], order: str, name: str, encoding: str, tmp_path: Path
) -> None:
    rows = [[{"p": path, "c": caption, "-": "7"}[kind] for kind in order] for path, caption in ROWS]
    file = tmp_path / name
    file.write_bytes(written(header, rows).encode(encoding))
    assert detect(str(file)).name == "open_clip"
    assert list(cc3m.read_pairs(str(file))) == [Pair(path, (caption,)) for path, caption in ROWS]
    about = describe(str(file))
    assert (about["samples"], about["problems"], about["kind"]) == (
        3,
        [],
        "open_clip's CSV (filepath, tab, title)",
    )
    assert [(sample["key"], sample["caption"]) for sample in about["first"]] == ROWS
    if "." in name:
        assert detect(str(tmp_path)).name == "open_clip"


def test_a_header_of_urls_is_cc3m_in_either_order(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('url\tcaption\nhttp://1\t"a" dot\n')
    assert detect(str(tmp_path / "a.tsv")).name == "cc3m"
    assert list(cc3m.read_pairs(str(tmp_path / "a.tsv"))) == [Pair("http://1", ('"a" dot',))]
    assert describe(str(tmp_path / "a.tsv"))["problems"] == []


@pytest.mark.parametrize("location", ["http://host/{}", "images/{}.jpg", "/data/{}.PNG"])
def test_swapped_columns_without_header_are_a_problem(location: str, tmp_path: Path) -> None:
    pairs = [(location.format(n), f"caption {n}") for n in range(5)]
    (tmp_path / "a.tsv").write_text("".join(f"{place}\t{text}\n" for place, text in pairs))
    (problem,) = describe(str(tmp_path / "a.tsv"))["problems"]
    assert "write a header such as filepath, tab, title" in problem
    (tmp_path / "b.tsv").write_text("".join(f"{text}\t{place}\n" for place, text in pairs))
    assert describe(str(tmp_path / "b.tsv"))["problems"] == []


def test_lines_with_other_columns_than_the_header(tmp_path: Path) -> None:
    text = "filepath\ttitle\tid\n1.jpg\tone\t1\n2.jpg\ttwo\n3.jpg three\n\n4.jpg\tfour\t4\n"
    (tmp_path / "a.csv").write_text(text)
    found = list(cc3m.read_pairs(str(tmp_path / "a.csv")))
    assert [(r.place, r.reason) if isinstance(r, BadRecord) else r.url for r in found] == [
        "1.jpg",
        ("line 3", "other columns than the header"),
        ("line 4", "no tab"),
        "4.jpg",
    ]


def test_a_line_of_ordinary_words_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("title\thttp://1\nthe path\thttp://2\n")
    assert [pair.url for pair in cc3m.read_pairs(str(tmp_path / "a.tsv")) if isinstance(pair, Pair)] == [
        "http://1", "http://2",
    ]  # fmt: skip
    (tmp_path / "b.csv").write_text("filepath,title\n1.jpg,one\n")
    with pytest.raises(UserError, match="with tabs between the columns"):
        describe(str(tmp_path / "b.csv"))
