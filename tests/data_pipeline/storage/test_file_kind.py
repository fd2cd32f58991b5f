"""Files of another kind under the name of a tar are called what they are, with what to do, by all that opens them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_pipeline.errors import UserError
from data_pipeline.formats import detect
from data_pipeline.index.build import build_index
from data_pipeline.show import describe
from data_pipeline.sources.manifest import SourceError, open_source
from data_pipeline.storage.file_kind import file_kind
from tests.support.s3_server import s3_server, upload
from tests.support.samples import write_source


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


def pointer(size: int) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%064x\nsize %d\n" % (size, size)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "x" * 900)
    return out.getvalue()


def table() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({"url": ["http://a"] * 50}), out)
    return out.getvalue()


PLAIN = bytes(range(256)) * 30
ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'
PAGE = b"<!DOCTYPE html><html><body>Sign in" + b" " * 3000
KINDS: dict[str, tuple[bytes, str]] = {
    "gzip": (gzip.compress(PLAIN, mtime=0), r"is compressed with gzip; unpack it.*: gzip -dc < 0\.tar >"),
    "small gzip": (gzip.compress(b"", mtime=0), r"is compressed with gzip; unpack it"),
    "bzip2": (bz2.compress(PLAIN), r"is compressed with bzip2; .*bzip2 -dc < 0\.tar >"),
    "xz": (lzma.compress(PLAIN), r"is compressed with xz; .*xz -dc < 0\.tar >"),
    "lzma": (lzma.compress(PLAIN, lzma.FORMAT_ALONE), r"is compressed with lzma; "),
    "zstd": (b"\x28\xb5\x2f\xfd" + PLAIN, r"is compressed with zstd; .*zstd -dc < 0\.tar >"),
    "pzstd": (b"\x50\x2a\x4d\x18\x04\0\0\0" + PLAIN, r"is compressed with zstd; "),
    "lz4": (b"\x04\x22\x4d\x18" + PLAIN, r"is compressed with lz4; "),
    "zip": (zipped(), r"is a zip archive; unpack it, .*tar --sort=name"),
    "lfs": (pointer(1234567), r"is a git-lfs pointer, .*git lfs pull"),
    "large lfs": (pointer(10**15), r"is a git-lfs pointer, .*git lfs pull"),
    "html": (PAGE, r"is a web page \(HTML\), .*fetch the file again"),
    "short html": (b"\xef\xbb\xbf \n<HTML>", r"is a web page \(HTML\), "),
    "utf-16 html": ("\ufeff<html>Sign in".encode("utf-16-le"), r"is a web page \(HTML\), "),
    "xml": (ERROR, r"is XML, probably the error of an object store"),
    "long xml": (ERROR + b" " * 5000, r"is XML, probably the error of an object store"),
    "json": (b'{"message": "not found"}', r"is JSON, not a tar"),
    "parquet": (table(), r"is a parquet file, not a tar; .*mv 0\.tar 0\.parquet"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "cut in the first header": (tarfile.TarInfo("a.txt").tobuf()[:300], r"is cut off: 300 bytes"),
    "noise": (b"\x89" + PLAIN, r"is not a tar"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    content, message = KINDS[kind]
    (tmp_path / "0.tar").write_bytes(content)
    message = r"0\.tar " + message
    for path in (str(tmp_path), str(tmp_path / "0.tar")):
        with pytest.raises(SourceError, match=message):
            open_source("a", path)
        problems = describe(path)["problems"]
        assert len(problems) == 1
        assert problems[0].count("0.tar") >= 1
    with pytest.raises(UserError, match=message):
        build_index(str(tmp_path))


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["gzip", "zstd", "lfs", "html", "xml", "empty"])
def test_the_same_on_s3(tmp_path: Path, s3: str, kind: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.tar").write_bytes(KINDS[kind][0])
    with pytest.raises(SourceError, match=KINDS[kind][1]):
        open_source("a", upload(tmp_path / "a", f"{s3}/{kind.replace(' ', '-')}"))


def test_the_command_that_is_named_helps(tmp_path: Path) -> None:
    """The message's own command makes a source of a compressed tar."""
    write_source(tmp_path / "a", [3])
    content = (tmp_path / "a" / "00000.tar").read_bytes()
    for compress in (lambda data: gzip.compress(data, mtime=0), bz2.compress, lzma.compress):
        (tmp_path / "a" / "00000.tar").write_bytes(compress(content))
        with pytest.raises(SourceError) as caught:
            open_source("a", str(tmp_path / "a"))
        command = str(caught.value).partition("cannot be read: ")[2].partition(", then remove it")[0]
        subprocess.run(["bash", "-c", command + " && rm 00000.tar"], check=True, cwd=tmp_path / "a")
        assert open_source("a", str(tmp_path / "a")).samples == 3
        (unpacked,) = (tmp_path / "a").iterdir()
        unpacked.unlink()


def test_a_named_file_that_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(PLAIN, mtime=0))
    for opened in (
        lambda: open_source("a", f"{tmp_path}/0.tar.gz"),
        lambda: open_source("a", f"{tmp_path}/*.tar.gz"),
    ):
        with pytest.raises(UserError, match=r"0\.tar\.gz is compressed with gzip"):
            opened()


@pytest.mark.parametrize(
    ("name", "kind"), [("a.parquet", "lfs"), ("a.jsonl", "lfs"), ("a.tsv", "html"), ("a.json", "xml")]
)
def test_tables_and_texts_of_another_kind(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(KINDS[kind][0])
    message = rf"{name} {KINDS[kind][1]}"
    if name == "a.parquet":
        assert any("is a git-lfs pointer" in problem for problem in describe(str(tmp_path))["problems"])
        return
    with pytest.raises(UserError, match=message):
        detect(str(tmp_path / name))


@pytest.mark.parametrize("first", ["BZh1.jpg", "]", "PAR1.txt", "<html>.txt", "{a}.txt", "PK"])
def test_a_tar_is_a_tar_whatever_its_first_name(first: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(first))
    assert file_kind(out.getvalue()) == "tar"
    assert file_kind(bytes(1024)) == "zeros"
    assert file_kind(out.getvalue()[:200]) in ("truncated", "bzip2", "parquet", "html", "json", "unknown")


@pytest.mark.parametrize(
    ("case", "message"), [("lfs", "git lfs pull"), ("zst_magic", "compressed with zstd")]
)
def test_the_files_that_people_met(shared: Path, case: str, message: str) -> None:
    source = str(shared / "cases/data/lfs_and_compressed" / case)
    with pytest.raises(SourceError, match=message):
        open_source("a", source)
    assert any(message in problem for problem in describe(source)["problems"])
