"""Views over ids with byte order marks, and over tars that were packed again with folders before their keys."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.formats import img2dataset
from data_pipeline.index.build_view import Rule, ViewResult, build_view
from data_pipeline.show import describe
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.sample_keys import match_keys
from tests.support.samples import encode, pixels, write_source

MARK = b"\xef\xbb\xbf"
KEYS = [f"00000{n:04d}" for n in range(8)]


def figures(result: ViewResult) -> tuple[int, int, int, int]:
    return result.kept, result.matched, result.absent, result.without_row


@pytest.mark.parametrize(
    "content",
    [
        b"000000000\n000000003\n",
        MARK + b"000000000\n000000003\n",  # op25 #94
        MARK + b"000000000\r\n000000003",
        MARK * 2 + b"000000000\n\n000000003\n",
        MARK + b"000000000\n" + MARK + b"000000003\n" + MARK,  # two files that were joined
        "\ufeff000000000\n000000003\n".encode("utf-16-le"),  # PowerShell's >
        "\ufeff000000000\r\n000000003\r\n".encode("utf-16-be"),
    ],
)
@pytest.mark.parametrize("name", ["ids.txt", "ids.csv", "ids"])
def test_a_byte_order_mark_hides_no_id(content: bytes, name: str, tmp_path: Path) -> None:
    root = str(write_source(tmp_path / "s", [8]))
    (tmp_path / name).write_bytes(content)
    assert figures(build_view(root, "v", Rule(ids=str(tmp_path / name)))) == (2, 2, 0, 0)
    view = open_source("s", root, "v")
    assert [view.tar_position(0, n) for n in range(view.samples)] == [0, 3]


@pytest.mark.parametrize("content", ["000000000\n".encode("utf-16-le"), b"\xff\xfe0\x000", b"0000\0\n"])
def test_ids_that_are_no_text_are_refused(content: bytes, tmp_path: Path) -> None:
    root = str(write_source(tmp_path / "s", [2]))
    (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"ids\.txt.*(NUL|not UTF-8)"):
        build_view(root, "v", Rule(ids=str(tmp_path / "ids.txt")))


def pack_again(tar: Path, folders: Sequence[str]) -> None:
    """Put one of `folders` before the name of each member, in turn by key, as `tar -cf X.tar FOLDER` does."""
    with tarfile.open(tar) as opened:
        entries = [(m.name, opened.extractfile(m).read()) for m in opened.getmembers()]  # type: ignore[union-attr]
    keys = list(dict.fromkeys(name.partition(".")[0] for name, _ in entries))
    with tarfile.open(tar, "w") as opened:
        for name, data in entries:
            folder = folders[keys.index(name.partition(".")[0]) * len(folders) // len(keys)]
            info = tarfile.TarInfo(folder + name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))


def download(folder: Path) -> Path:
    rows = [
        img2dataset.Row(f"u{n}", f"caption {n}", encode(pixels(0, n)), 24, 20, extension="png")
        for n in range(8)
    ]
    rows.append(img2dataset.Row("f", "c", None, status="failed_to_resize", error_message="image too small"))
    for shard in range(2):
        img2dataset.write_shard(str(folder), shard, rows)
    return folder


# The first is the folder of img2dataset #211.
FOLDERS = [["./00000/"], ["00000/"], ["./"], ["data/train/v2.1/00000/"], ["./a/", "./b/"], ["", "x/"]]


@pytest.mark.parametrize("folders", FOLDERS)
def test_a_tar_that_was_packed_again_is_joined(folders: list[str], tmp_path: Path) -> None:
    whole, again = download(tmp_path / "whole"), download(tmp_path / "again")
    pack_again(again / "00001.tar", folders)
    about = describe(str(again))
    assert about["problems"] == []
    (note,) = about["notes"]
    assert "1 of 2 (50.0 %) tars examined have folders before the keys" in note
    assert f"such as {folders[-1] if not folders[0] else folders[0]}" in note
    rule = Rule(where="caption in ['caption 1', 'caption 6']")
    assert (
        figures(build_view(str(again), "v", rule))
        == figures(build_view(str(whole), "v", rule))
        == (4, 4, 0, 0)
    )
    (tmp_path / "ids.txt").write_bytes(MARK + b"000000002\n000010001\n000010008\n00007\n")
    rule = Rule(ids=str(tmp_path / "ids.txt"))
    assert (
        figures(build_view(str(again), "i", rule))
        == figures(build_view(str(whole), "i", rule))
        == (2, 4, 2, 0)
    )
    chosen = open_source("s", str(again), "i")
    assert [chosen.tar_position(shard, 0) for shard in (0, 1)] == [2, 1]


def test_a_tar_of_another_run_is_still_a_problem(tmp_path: Path) -> None:
    again = download(tmp_path / "again")
    (again / "00001.tar").write_bytes((again / "00000.tar").read_bytes())
    pack_again(again / "00001.tar", ["./00001/"])
    problems = describe(str(again))["problems"]
    assert any("8 of them are not in" in problem for problem in problems)
    assert any("holds 8 samples that" in problem for problem in problems)


def test_a_name_that_fits_two_samples_fits_neither() -> None:
    assert match_keys(["a/1", "b/1", "c/2"], {"1", "2"}) == ["a/1", "b/1", "2"]
    assert match_keys(["1", "b/1"], {"1"}) == ["1", "b/1"]
    assert match_keys(["a/b/1", "a/2"], {"b/1", "1", "a/2"}) == ["b/1", "a/2"]


@given(st.lists(st.sampled_from(["1", "2", "a/1", "b/1", "a/b/2", "./3", "3"]), unique=True), st.data())
def test_matching_is_one_to_one_and_keeps_listed_keys(keys: list[str], data: st.DataObject) -> None:
    listed = data.draw(st.sets(st.sampled_from(["1", "2", "3", "a/1", "b/2"])))
    names = match_keys(keys, listed)
    assert len(set(names)) == len(keys)
    for key, name in zip(keys, names, strict=True):
        assert name == key if key in listed else name == key or (name in listed and key.endswith(f"/{name}"))
