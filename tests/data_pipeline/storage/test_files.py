"""Listing, ranges and atomic writes, on a disk and on an S3 endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from data_pipeline import storage
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import ReadError, UserError
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import TarWriter
from data_pipeline.storage import object_store
from data_pipeline.transforms.decode import ImageSpec
from tests.support.recorded_files import recorded
from tests.support.s3_server import s3_server, stop
from tests.support.samples import write_source


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as root:
        yield root


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Root of an empty folder, on disk or in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def names(shards: list[str]) -> list[str]:
    return [shard.rpartition("/")[2] for shard in shards]


def fill(root: str, *files: str) -> None:
    for file in files:
        storage.publish(f"{root}/{file}", file.encode())


def test_a_folder_gives_its_own_tars_sorted(root: str) -> None:
    fill(root, "00001.tar", "00000.tar", "00000.parquet", "00000_stats.json", "test/00009.tar", ".hidden.tar")
    assert storage.list_shards(root) == [f"{root}/00000.tar", f"{root}/00001.tar"]
    assert storage.list_shards(root + "/") == [f"{root}/00000.tar", f"{root}/00001.tar"]
    assert storage.list_shards(f"{root}/00001.tar") == [f"{root}/00001.tar"]


def test_a_folder_listing_is_not_cached(root: str) -> None:
    fill(root, "00000.tar")
    assert len(storage.list_shards(root)) == 1
    fill(root, "00001.tar")
    assert len(storage.list_shards(root)) == 2


def test_a_brace_pattern_gives_its_expansions_in_order(root: str) -> None:
    shards = storage.list_shards(root + "/{b,a}/{00000..00002}.tar")
    assert shards == [f"{root}/{folder}/0000{n}.tar" for folder in "ba" for n in range(3)]
    assert storage.root_of(root + "/{b,a}/{00000..00002}.tar") == root


def test_a_star_gives_the_existing_files_sorted(root: str) -> None:
    fill(root, "a/1.tar", "a/0.tar", "b/0.tar", "b/0.json")
    assert storage.list_shards(root + "/{b,a}/*.tar") == [
        f"{root}/{f}" for f in ("b/0.tar", "a/0.tar", "a/1.tar")
    ]
    with pytest.raises(UserError, match="no file matches"):
        storage.list_shards(root + "/c/*.tar")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.txt"], r"holds no \.tar files; name a folder of tars"),
        (["a.tar.gz"], r"a\.tar\.gz is compressed: unpack it"),
    ],
)
def test_a_folder_without_tars_says_what_to_do(root: str, files: list[str], message: str) -> None:
    fill(root, *files)
    with pytest.raises(UserError, match=message) as caught:
        storage.list_shards(root)
    assert root in str(caught.value)


def test_a_folder_above_the_tars_names_those_below(tmp_path: Path) -> None:
    fill(str(tmp_path), "train/0.tar", "test/0.tar", "notes/a.txt")
    with pytest.raises(UserError, match="files are in the subfolders test, train"):
        storage.list_shards(str(tmp_path))


def test_a_missing_path_is_named(root: str) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        storage.list_shards(f"{root}/nowhere")
    with pytest.raises(FileNotFoundError):
        storage.size(f"{root}/nowhere.tar")
    assert storage.sizes([f"{root}/nowhere.tar"]) == {}
    assert not storage.exists(f"{root}/nowhere.tar")


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    for content, message in ((b"", r"is empty \(0 bytes\)"), (b"words", "is a file, not a folder")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            storage.list_shards(str(tmp_path / "a.txt"))


def test_unbalanced_braces_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        storage.list_shards(str(tmp_path / "{a,b/*.tar"))


def test_ranges(root: str) -> None:
    data = bytes(range(256)) * 40
    storage.publish(f"{root}/a.bin", data)
    url = f"{root}/a.bin"
    assert storage.size(url) == len(data)
    assert storage.sizes([url, url + "x"]) == {url: len(data)}
    assert storage.read_bytes(url) == data
    assert storage.read_many([url, url + "x"]) == {url: data}
    for offset, length in [(0, 1), (100, 5000), (len(data) - 1, 1), (7, 0), (0, len(data))]:
        assert storage.read_range(url, offset, length) == data[offset : offset + length]
    with pytest.raises(OSError, match=r"requested bytes 10000 to 11000, received 240"):
        storage.read_range(url, 10_000, 1000)
    with storage.open_bytes(url) as file:
        assert file.read(3) == data[:3]


def test_publishing_is_all_or_nothing(root: str) -> None:
    url = f"{root}/a.bin"
    storage.publish(url, b"old")

    def half(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        storage.publish(url, half)
    assert storage.read_bytes(url) == b"old"
    storage.publish(url, lambda file: (file.write(b"new"), None)[1])
    assert storage.read_bytes(url) == b"new"
    if not storage.is_remote(root):
        assert os.listdir(root) == ["a.bin"]


def test_what_is_published_is_whole_after_a_power_cut_and_stays(tmp_path: Path) -> None:
    """A new file in new folders, and one that replaces another; each is there for good once `publish` returns."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/old").write_bytes(b"old bytes")
    with recorded(tmp_path / "root") as disk:
        storage.publish(tmp_path / "root/a/b/new", lambda file: file.writelines([b"many ", b"bytes"]))
        disk.promise("new")
        storage.publish(f"file://{tmp_path}/root/old", b"new bytes")
        disk.promise("old")
    for outcome in disk.outcomes():
        found = {path: content for path, content in outcome.files.items() if not path.endswith(".tmp")}
        assert found.pop("a/b/new", b"many bytes") == b"many bytes", outcome.after
        assert found.pop("old") in (
            [b"new bytes"] if "old" in outcome.promised else [b"old bytes", b"new bytes"]
        )
        assert set(found) <= {"a", "a/b"}
        assert "new" not in outcome.promised or "a/b/new" in outcome.files, outcome.after


CALLS: dict[str, Callable[[str], object]] = {
    "exists": lambda root: storage.exists(f"{root}/00000.tar"),
    "size": lambda root: storage.size(f"{root}/00000.tar"),
    "sizes": lambda root: storage.sizes([f"{root}/00000.tar"]),
    "bytes": lambda root: storage.read_bytes(f"{root}/00000.tar"),
    "many": lambda root: storage.read_many([f"{root}/00000.tar"]),
    "range": lambda root: storage.read_range(f"{root}/00000.tar", 0, 10),
    "open": lambda root: storage.open_bytes(f"{root}/00000.tar"),
    "folder": storage.list_shards,
    "star": lambda root: storage.list_shards(f"{root}/*.tar"),
    "publish": lambda root: storage.publish(f"{root}/new.tar", b"new"),
    "source": lambda root: open_source("pairs", root),
}


@pytest.fixture(scope="module")
def dead() -> Iterator[tuple[str, ShardReader]]:
    """(root URL of a bucket whose server is down, reader that was opened before)."""
    with s3_server() as root, pytest.MonkeyPatch.context() as patch:
        with TarWriter(f"{root}/00000.tar") as tar:
            tar.write("0", {"txt": b"a"})
        reader = ShardReader(open_source("pairs", root))
        assert reader.read(0, 0) == ("0", {"txt": b"a"})
        stop(root, patch)
        yield root, reader


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_does_not_answer_is_a_read_error(dead: tuple[str, ShardReader], call: str) -> None:
    root, _ = dead
    storage.filesystem(root).invalidate_cache()  # otherwise an earlier listing would answer
    with pytest.raises(ReadError, match=f"{root}.*Error: ") as caught:
        CALLS[call](root)
    assert ("source 'pairs'" in str(caught.value)) == (call == "source")


def test_a_read_error_names_the_sample(dead: tuple[str, ShardReader]) -> None:
    root, reader = dead
    spec = StreamSpec("pairs", 0, {"a": SourceSpec(root)}, batch=1, image=ImageSpec())
    with pytest.raises(
        ReadError, match=rf"{root}/00000\.tar, sample 0: .* stopped at byte 0 after 2 tries: "
    ):
        BatchBuilder(spec, {"a": reader.manifest}).make(0, 0, 1)


def test_missing_credentials_and_a_wrong_bucket_name_are_user_errors(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    with pytest.raises(UserError, match=r"s3://No_Bucket!/a\.tar: .*correct the bucket's name"):
        storage.read_bytes("s3://No_Bucket!/a.tar")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    object_store.clear_filesystems()
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UserError, match=rf"{s3}/a\.tar: .*credentials; set AWS_ACCESS_KEY_ID"):
            storage.read_bytes(f"{s3}/a.tar")
    finally:
        object_store.clear_filesystems()
        s3fs.S3FileSystem.clear_instance_cache()


def test_an_error_of_the_writer_passes_through(s3: str) -> None:
    class Mistake(Exception):
        pass

    def broken(file: BinaryIO) -> None:
        raise Mistake

    with pytest.raises(Mistake):
        storage.publish(f"{s3}/a.bin", broken)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(UserError, match=r"nonsense:// needs a package"):
        storage.exists("nonsense://bucket/a.tar")


def test_path_below() -> None:
    assert storage.path_below("./data", "./data/a/0.tar") == "a/0.tar"
    assert storage.path_below("data", "data//0.tar") == "0.tar"
    assert storage.path_below("", "a/0.tar") == "a/0.tar"
    assert storage.path_below("s3://b/x", "s3://b/x/y/0.tar") == "y/0.tar"


def test_a_fifo_among_tars_is_an_error_and_does_not_block(tmp_path: Path) -> None:
    source = write_source(tmp_path / "pairs", [3])
    os.mkfifo(source / "00001.tar")
    with pytest.raises(UserError, match=r"00001\.tar is not a regular file"):
        open_source("pairs", str(source))
