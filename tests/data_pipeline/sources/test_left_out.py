"""Links, names without extension and names with dots: followed, or counted and said by all that opens a source."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import ContentError
from data_pipeline.index.build import build_index
from data_pipeline.show import describe
from data_pipeline.sources.left_out import DOTTED, HARD, HIDDEN, NAMELESS, SPECIAL, SYMBOLIC, LeftOutWarning
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.scan import scan_file
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import member_table
from launch.cli.app import app
from tests.support.s3_server import s3_server, upload

Fill = Callable[[tarfile.TarFile], None]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


def add(
    tar: tarfile.TarFile, name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(content) if kind == tarfile.REGTYPE else 0
    tar.addfile(info, io.BytesIO(content))


def write(folder: Path, fill: Fill, form: int = tarfile.GNU_FORMAT, good: int = 3) -> str:
    """A source of one tar: `good` whole samples, what `fill` adds, one more sample."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w", format=form) as tar:
        for number in range(good):
            add(tar, f"{number:04d}.jpg", b"image")
            add(tar, f"{number:04d}.txt", b"caption")
        fill(tar)
        add(tar, "last.jpg", b"image")
        add(tar, "last.txt", b"caption")
    return str(folder)


def links(kind: bytes, target: str) -> Fill:
    def fill(tar: tarfile.TarFile) -> None:
        for number in range(2):
            add(tar, f"linked{number}.jpg", kind=kind, link=target)
            add(tar, f"linked{number}.txt", kind=kind, link=target)

    return fill


def named(*names: str) -> Fill:
    def fill(tar: tarfile.TarFile) -> None:
        for name in names:
            add(tar, name)

    return fill


# What is added, the counts by reason, and the first name of each.
KINDS: dict[str, tuple[Fill, dict[str, int], str]] = {
    "symbolic links": (links(tarfile.SYMTYPE, "../../blobs/ab12"), {SYMBOLIC: 4}, "linked0.jpg"),
    "symbolic links with long names": (links(tarfile.SYMTYPE, "t" * 200), {SYMBOLIC: 4}, "linked0.jpg"),
    "hard links out of the tar": (links(tarfile.LNKTYPE, "elsewhere/0.jpg"), {HARD: 4}, "linked0.jpg"),
    "pipes": (links(tarfile.FIFOTYPE, ""), {SPECIAL: 4}, "linked0.jpg"),
    "no extension": (named("a_jpg", "a_txt", "dir.x/b_jpg"), {NAMELESS: 3}, "a_jpg"),
    "no extension, long": (named("n" * 180), {NAMELESS: 1}, "n" * 120),
    "not ASCII": (named("größe_jpg"), {NAMELESS: 1}, "größe_jpg"),
    "hidden": (named("._a.jpg", "d/.b.txt"), {HIDDEN: 2}, "._a.jpg"),
    "dots": (named("cdn.org_1.jpg", "cdn.org_1.txt", "cdn.org_2.jpg"), {DOTTED: 2}, "cdn.org_1.jpg"),
    "versions": (named("v1.0_a.jpg", "v1.0_a.txt"), {DOTTED: 1}, "v1.0_a.jpg"),
    "upper case": (named("x.y.JPG"), {DOTTED: 1}, "x.y."),
    "beside a plain image": (named("p.jpg", "p.txt", "p.2.jpg", "p.2.txt"), {DOTTED: 1}, "p.2.jpg"),
}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_no_sample_is_counted_and_said(tmp_path: Path, kind: str, form: int) -> None:
    fill, counts, first = KINDS[kind]
    source = write(tmp_path / "a", fill, form)
    scanned = scan_file(f"{source}/0.tar")
    assert scanned.left_out.counts == counts
    table_counts = type(scanned.left_out)()
    member_table(f"{source}/0.tar", left_out=table_counts)
    assert table_counts.counts == counts
    with pytest.warns(LeftOutWarning, match="0.tar") as warned:
        bare = open_source("a", source)
    (sentence,) = (str(warning.message) for warning in warned)
    (reason,) = counts
    assert sentence.startswith(f"source 'a': {counts[reason]} {reason} ")
    assert first in sentence
    assert "; " in sentence
    about = describe(source)
    assert about["left_out"] == counts
    said = about["notes"] if reason == HIDDEN else about["problems"]
    assert any(line.startswith(f"{source}: {counts[reason]} {reason} ") for line in said)
    indexed = build_index(source)
    assert indexed.manifest.left_out.counts == bare.left_out.counts == counts
    with pytest.warns(LeftOutWarning, match=str(counts[reason])):
        assert open_source("a", source).counted_by == "manifest"
    assert describe(source)["left_out"] == counts


def test_the_commands_say_it(tmp_path: Path) -> None:
    source = write(tmp_path / "a", links(tarfile.SYMTYPE, "b"))
    run = CliRunner().invoke
    line = f"{source}: 4 symbolic links are in no sample; the first is linked0.jpg in 0.tar; write the "
    line += "tars with: tar --dereference"
    shown = run(app, ["data", "show", source])
    assert (shown.exit_code, line in shown.output.replace("\n", " ")) == (2, True)
    as_json = run(app, ["data", "show", source, "--json"])
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)[0]["left_out"] == {SYMBOLIC: 4}
    indexed = run(app, ["data", "index", source])
    assert (indexed.exit_code, line in indexed.output) == (0, True)


def test_a_clean_tar_says_nothing(tmp_path: Path) -> None:
    """Members that are known to be no data, and second images of a sample, are not counted."""
    source = write(
        tmp_path / "a",
        named("__meta__/x", "s.jpg", "s.seg.png", "s.txt", "s.depth.png", "d/t.png", "d/t.json"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        open_source("a", source)
        build_index(source)
        open_source("a", source)
    assert describe(source)["left_out"] == {}


def test_few_are_a_note(tmp_path: Path) -> None:
    source = write(tmp_path / "a", named("README"), good=200)
    about = describe(source)
    assert about["left_out"] == {NAMELESS: 1}
    assert not any("extension in" in problem for problem in about["problems"])
    assert any("README" in note for note in about["notes"])


def gnu_tar(folder: Path, *names: str, dereference: bool = False) -> str:
    (folder / "a").mkdir()
    options = ["--dereference", "--hard-dereference"] if dereference else []
    subprocess.run(["tar", *options, "-cf", folder / "a" / "0.tar", "-C", folder / "in", *names], check=True)
    return str(folder / "a")


def hard_linked(folder: Path) -> dict[str, bytes]:
    """Files of which several share their content by hard links, as tools that remove duplicates leave them."""
    (folder / "in").mkdir()
    contents = {}
    for number in range(6):
        name = f"{number}.jpg"
        contents[name] = bytes([65 + number % 2]) * 700
        if number < 2:
            (folder / "in" / name).write_bytes(contents[name])
        else:
            os.link(folder / "in" / f"{number % 2}.jpg", folder / "in" / name)
        contents[f"{number}.txt"] = b"caption %d" % number
        (folder / "in" / f"{number}.txt").write_bytes(contents[f"{number}.txt"])
    return contents


@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("indexed", [False, True])
def test_hard_links_inside_the_tar_are_followed(tmp_path: Path, prefix: str, indexed: bool) -> None:
    """GNU tar's own links, with and without `./`; the truth is the files on disk."""
    contents = hard_linked(tmp_path)
    source = gnu_tar(tmp_path, *(prefix + name for name in contents))
    check_links(source, contents, prefix, indexed)


@pytest.mark.integration
@pytest.mark.parametrize("indexed", [False, True])
def test_hard_links_are_followed_on_s3(tmp_path: Path, s3: str, indexed: bool) -> None:
    contents = hard_linked(tmp_path)
    source = upload(Path(gnu_tar(tmp_path, *contents)), f"{s3}/links{indexed}")
    check_links(source, contents, "", indexed)


def check_links(source: str, contents: dict[str, bytes], prefix: str, indexed: bool) -> None:
    if indexed:
        build_index(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOutWarning)
        manifest = open_source("a", source)
    assert (manifest.samples, manifest.left_out.counts) == (6, {})
    reader = ShardReader(manifest)
    for number in (5, 0, 3, 1, 2, 4):
        want = {name: contents[f"{number}.{name}"] for name in ("jpg", "txt")}
        assert reader.read(0, number) == (f"{prefix}{number}", want)
    reader.close()
    first = describe(source)["first"]
    assert [sample["members"] for sample in first[:3]] == [{"jpg": 700, "txt": 9}] * 3


def test_the_advice_helps(tmp_path: Path) -> None:
    """`tar --dereference` of a folder with links gives a tar with nothing left out."""
    hard_linked(tmp_path)
    for number in range(2):
        (tmp_path / "in" / f"soft{number}.jpg").symlink_to(f"{number}.jpg")
        (tmp_path / "in" / f"soft{number}.txt").symlink_to(f"{number}.txt")
    names = sorted(path.name for path in (tmp_path / "in").iterdir())
    source = gnu_tar(tmp_path, *names)
    assert scan_file(f"{source}/0.tar").left_out.counts == {SYMBOLIC: 4}
    subprocess.run(["rm", "-r", source], check=True)
    source = gnu_tar(tmp_path, *names, dereference=True)
    scanned = scan_file(f"{source}/0.tar")
    assert (scanned.samples, scanned.left_out.counts) == (8, {})


def test_a_link_to_the_last_of_two_files_of_one_name(tmp_path: Path) -> None:
    def fill(tar: tarfile.TarFile) -> None:
        add(tar, "same.jpg", b"first")
        add(tar, "between.txt", b"x")
        add(tar, "same.jpg", b"second")
        add(tar, "link.jpg", kind=tarfile.LNKTYPE, link="same.jpg")
        add(tar, "link.txt", b"caption")

    source = write(tmp_path / "a", fill)
    with tarfile.open(f"{source}/0.tar") as tar:
        taken = tar.extractfile("link.jpg")
        assert taken is not None
        want = taken.read()
    reader = ShardReader(open_source("a", source))
    assert reader.read(0, 6) == ("link", {"jpg": want, "txt": b"caption"})
    reader.close()


def test_names_with_dots_take_linear_time(tmp_path: Path) -> None:
    """32,000 pairs in one sample of webdataset's; the parent took more than 120 s."""
    path = tmp_path / "a" / "0.tar"
    path.parent.mkdir()
    with path.open("wb") as out:
        for number in range(32_000):
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"cdn.example.org_{number:05d}.{extension}")
                out.write(info.tobuf(tarfile.USTAR_FORMAT))
        out.write(bytes(10240))
    began = time.process_time()
    indexed = build_index(str(path.parent))
    assert time.process_time() - began < 2
    assert indexed.manifest.left_out.counts == {DOTTED: 32_000}
    about = describe(str(path.parent))
    assert len(json.dumps(about)) < 10_000
    assert about["other_members"] == 64_000 - 32


def test_the_reason_of_a_sample_with_thousands_of_members_is_short() -> None:
    error = ContentError("missing image", ", ".join(f"example.org_{number}.jpg" for number in range(30_000)))
    again = pickle.loads(pickle.dumps(error))  # bytes made in this line, as a worker sends its error
    assert len(error.detail) == len(again.detail) == 1000
    assert len(str(again)) < 1100


@pytest.mark.parametrize(
    ("case", "counts", "samples"),
    [("symlinks_whole", {SYMBOLIC: 10}, 5), ("no_extension", {NAMELESS: 6}, 3)],
)
def test_the_files_that_people_met(shared: Path, case: str, counts: dict[str, int], samples: int) -> None:
    source = str(shared / "cases/data/links_and_nameless" / case)
    with pytest.warns(LeftOutWarning):
        manifest = open_source("a", source)
    with tarfile.open(f"{source}/00000.tar") as tar:  # the truth
        assert sum(counts.values()) == sum(m.issym() or "." not in m.name for m in tar)
    assert (manifest.left_out.counts, manifest.samples) == (counts, samples)
    assert describe(source)["problems"]


def test_the_dots_that_people_met(shared: Path) -> None:
    source = str(shared / "cases/data/dots_in_names/dots_domain")
    with pytest.warns(
        LeftOutWarning, match=r"10 images with more than one dot .* first dot .*cdn\.example\.org_0000"
    ):
        assert open_source("a", source).samples == 1
    assert any("more than one dot" in problem for problem in describe(source)["problems"])
