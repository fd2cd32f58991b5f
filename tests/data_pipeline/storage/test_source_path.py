"""Paths of sources on disk and S3: what is refused, what is a pattern, and which files beside the tars are said."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.index.build import build_index
from data_pipeline.show import describe
from data_pipeline.sources.left_out import LeftOutWarning
from data_pipeline.sources.manifest import open_source
from data_pipeline.storage.listing import listed
from launch.cli.data_reports import index_lines
from tests.support.s3_server import s3_server
from tests.support.samples import write_source


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Root of an empty folder, on disk or in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (write_source(tmp_path_factory.mktemp("tar"), [3]) / "00000.tar").read_bytes()


def fill(root: str, *files: str, content: bytes = b"x") -> None:
    for file in files:
        storage.publish(f"{root}/{file}", content)


def below(root: str, pattern: str) -> list[str]:
    return [url.removeprefix(f"{root}/") for url in storage.list_shards(f"{root}/{pattern}")]


def test_two_stars_are_folders_of_any_depth(root: str) -> None:
    fill(root, "0.tar", "a/1.tar", "a/b/2.tar", "a/b/c/3.tar", "a/b/n.txt", ".hidden/4.tar", "a/.5.tar")
    every = ["0.tar", "a/1.tar", "a/b/2.tar", "a/b/c/3.tar"]
    assert below(root, "**/*.tar") == every
    assert below(root, "**") == every
    assert below(root, "a/**/*.tar") == every[1:]
    assert below(root, "a/**/[23].tar") == every[2:]
    assert below(root, "*/*.tar") == ["a/1.tar"]
    assert below(root, "{a/b,a}/**/2.tar") == ["a/b/2.tar", "a/b/2.tar"]
    assert storage.root_of(f"{root}/a/**/*.tar") == f"{root}/a"
    for wrong in ("**.tar", "a**/*.tar", "**b/x.tar"):
        with pytest.raises(UserError, match=r"\*\* stands for folders of any depth.*/\*\*/\*\.tar"):
            storage.list_shards(f"{root}/{wrong}")


@pytest.mark.parametrize("name", ["[v2] x", "a{b", "a}b", "{a,b", "x[1"])
def test_a_path_that_exists_comes_before_a_pattern(root: str, tar: bytes, name: str) -> None:
    fill(root, f"{name}/00000.tar", f"{name}/00001.tar", content=tar)
    fill(root, "v x/00007.tar", "2 x/00008.tar", content=tar)  # what the pattern would match
    folder = f"{root}/{name}"
    both = [f"{folder}/00000.tar", f"{folder}/00001.tar"]
    assert storage.list_shards(folder) == both
    assert storage.list_shards(both[1]) == both[1:]
    assert storage.list_shards(f"{folder}/{{00000..00001}}.tar") == both
    assert storage.list_shards(f"{folder}/*1.tar") == both[1:]
    assert (storage.root_of(folder), storage.root_of(f"{folder}/*.tar")) == (folder, folder)
    assert not storage.is_pattern(folder)
    assert storage.is_pattern(f"{folder}/*.tar")
    assert open_source("a", folder).samples == build_index(folder).manifest.samples == 6
    about = describe(folder)
    assert (about["samples"], about["problems"]) == (6, [])


def test_names_of_stars_and_braces_on_disk(tmp_path: Path, tar: bytes) -> None:
    for name in ("{a,b}", "a*", "what?", "{00000..00003}"):
        fill(str(tmp_path), f"{name}/0.tar", content=tar)
        assert open_source("a", str(tmp_path / name)).paths == ["0.tar"]
        assert storage.list_shards(f"{tmp_path}/{name}/*.tar") == [f"{tmp_path}/{name}/0.tar"]
    fill(str(tmp_path), "a{0..1}.tar", content=tar)
    assert storage.list_shards(f"{tmp_path}/a{{0..1}}.tar") == [f"{tmp_path}/a{{0..1}}.tar"]
    assert storage.root_of(f"{tmp_path}/a{{0..1}}.tar") == str(tmp_path)


def test_relative_paths(tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(".", "[v2] x/0.tar", "1.tar", content=tar)
    assert storage.list_shards("[v2] x") == ["[v2] x/0.tar"]
    assert (storage.list_shards("*.tar"), storage.root_of("*.tar")) == (["1.tar"], "")
    assert storage.list_shards("{1,2}.tar") == ["1.tar", "2.tar"]


REFUSED = {
    "hf://datasets/org/name": r"not from hf://; .*hf download",
    "hf://org/name/{0..3}.tar": r"not from hf://; .*hf download",
    "http://host/a.tar": r"not from http://; .*wget",
    "https://host/{00000..00003}.tar": r"not from https://; .*wget",
    "gs://bucket/a": r"not from gs://; .*gcloud storage cp",
    "gcs://bucket/*.tar": r"not from gcs://; copy the files",
    "abfs://c/x.tar": r"not from abfs://; copy the files",
    "pipe:curl -s http://host/a.tar": r"never a command",
    "pipe:aws s3 cp s3://bucket/{0..3}.tar -": r"never a command",
    "a.tar::b.tar": r":: does not join paths; write a pattern such as \{a,b\}\.tar",
    "/data/a::/data/b": r":: does not join paths",
}


@pytest.mark.parametrize("path", REFUSED)
def test_addresses_that_are_not_read_are_refused_in_one_sentence(path: str) -> None:
    for opened in (storage.list_shards, describe, build_index, lambda given: open_source("a", given)):
        with pytest.raises(UserError, match=REFUSED[path]) as caught:
            opened(path)
        assert path in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_path_with_two_colons_that_exists_is_read(tmp_path: Path, tar: bytes) -> None:
    fill(str(tmp_path), "a::b/0.tar", content=tar)
    assert open_source("a", str(tmp_path / "a::b")).samples == 3


@pytest.mark.integration
def test_s3a_is_s3(s3: str, tar: bytes) -> None:
    fill(f"{s3}/s3a", "0.tar", "1.tar", content=tar)
    other = f"s3a{s3.removeprefix('s3')}/s3a"
    for path in (other, f"{other}/0.tar", f"{other}/*.tar", f"{other}/{{0,1}}.tar"):
        manifest = open_source("a", path)
        assert manifest.root == f"{s3}/s3a"
        assert describe(path)["samples"] == manifest.samples == 3 * len(manifest.paths)
    assert build_index(other).manifest.counted_by == "manifest"


def test_what_lies_beside_the_tars_is_said(root: str, tar: bytes) -> None:
    """By name and number, in show, index and at the start of a run."""
    fill(root, "00000.tar", "train/0.tar", "train/1.tar", content=tar)
    fill(root, "00001.tar.gz", "00002.tgz", "00003.tar.zst", "00004.TAR", "00005.tar.part", "00006.tar.aria2")
    fill(root, "00000.tar.idx", "00000_stats.txt", "notes.txt", ".00007.tar.gz", "plain/a.txt")
    said = [
        "3 compressed tars beside the 1 .tar files are not read (00001.tar.gz, 00002.tgz, 00003.tar.zst); unpack",
        "1 files beside the 1 .tar files are not read (00004.TAR); rename",
        "2 files that a download or a copy left beside the 1 .tar files are not read (00005.tar.part, 00006.tar.aria2)",
        "2 tars in 1 subfolders beside the 1 .tar files are not read (train); read them with a pattern such as "
        f"{root}/train/*.tar",
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_source("a", root)
    about = describe(root)
    assert len(about["problems"]) == 3
    lines = [line for line, is_warning in index_lines(root, build_index(root)) if is_warning]
    for sentence in said:
        assert any(sentence in str(warning.message) for warning in caught)
        assert any(sentence in line for line in [*about["problems"], *about["notes"]])
        assert any(sentence in line for line in lines)


def test_names_that_differ_in_numbers_are_folded(root: str, tar: bytes) -> None:
    fill(root, "a.tar", content=tar)
    fill(root, *(f"{number:05d}.tar.gz" for number in range(40)))
    (sentence, is_missing) = storage.unread_files(root).sentences(root)[0]
    assert is_missing
    assert "40 compressed tars" in sentence
    assert "(00000.tar.gz to 00039.tar.gz (40))" in sentence


def test_copies_are_a_note_and_a_pattern_says_what_is_read(root: str, tar: bytes) -> None:
    fill(root, "0.tar", "1.tar", content=tar)
    fill(root, "0.tar.gz", "1.tgz")
    about = describe(root)
    assert about["problems"] == []
    assert any("2 compressed tars" in note for note in about["notes"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        open_source("a", f"{root}/*.tar")
        open_source("a", f"{root}/0.tar")


def test_a_list_of_names_is_bounded() -> None:
    assert listed(["b", "a"]) == "b, a"
    assert listed([f"{n}.tar" for n in range(3)]) == "0.tar to 2.tar (3)"
    text = listed([f"{letter * 300}{n}" for letter in "abcdefghijklmn" for n in range(100)])
    assert text.endswith(" and 400 more")
    assert len(text) < 3000


def test_the_folder_that_people_met(shared: Path) -> None:
    source = str(shared / "cases/data/mixed_suffixes/mixed_gz")
    with pytest.warns(LeftOutWarning, match=r"2 compressed tars .*\(00001\.tar\.gz, 00002\.tgz\); unpack"):
        open_source("a", source)
    assert any("2 compressed tars" in problem for problem in describe(source)["problems"])
