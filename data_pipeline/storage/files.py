"""Bytes in files and object stores: listing shards, range reads, writes that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from data_pipeline import activity
from data_pipeline.errors import UserError
from data_pipeline.storage import object_store
from data_pipeline.storage.object_store import filesystem, store_errors, with_retries

PATTERN = re.compile(r"[{*?\[]")
SHARD_SUFFIX = ".tar"
TEMPORARY = ".tmp"
SIDE_BY_SIDE = 16  # small remote files fetched at once


def is_remote(url: str) -> bool:
    """True for `s3://bucket/key` and every other fsspec protocol; `file://` counts as local."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> str:
    """Of a file: the url without `file://`. Other urls stay as they are."""
    return url.removeprefix("file://")


def join(root: str, path: str) -> str:
    """`path` below `root`; "/" separates on both sides."""
    return f"{root.rstrip('/')}/{path}" if root else path


def exists(url: str) -> bool:
    if not is_remote(url):
        return os.path.exists(local_path(url))
    return bool(with_retries(url, lambda store: store.exists(url)))


def size(url: str) -> int:
    """Bytes of the file. Raises FileNotFoundError."""
    if not is_remote(url):
        return os.stat(local_path(url)).st_size
    return int(with_retries(url, lambda store: store.size(url)))


def sizes(urls: Sequence[str], tags: dict[str, int] | None = None) -> dict[str, int]:
    """Bytes of each file that exists; a remote folder is listed once instead of asked file by file.

    `tags` is filled with the version of each remote file, see object_store.version_of.
    """
    found: dict[str, int] = {}
    for folder in {url.rpartition("/")[0] for url in urls if is_remote(url)}:
        with suppress(FileNotFoundError):
            for url, entry in with_retries(folder, partial(_entries, folder)).items():
                found[url] = entry["size"] or 0
                if tags is not None and "ETag" in entry:
                    tags[url] = object_store.version_of(str(entry["ETag"]))
    for url in urls:
        if not is_remote(url):
            with suppress(FileNotFoundError):
                status = os.stat(local_path(url))
                if not stat.S_ISREG(status.st_mode):
                    raise UserError(f"{url} is no regular file; remove it, or narrow the pattern")
                found[url] = status.st_size
    return {url: found[url] for url in urls if url in found}


def _entries(folder: str, store: Any) -> dict[str, dict[str, Any]]:
    return {store.unstrip_protocol(entry["name"]): entry for entry in store.ls(folder, detail=True)}


def remove(urls: Sequence[str]) -> None:
    """Delete files; those that are gone already are left at that."""
    for url in urls:
        with suppress(FileNotFoundError):
            if is_remote(url):
                with_retries(url, partial(_remove, url))
            else:
                os.unlink(local_path(url))


def _remove(url: str, store: Any) -> None:
    store.rm_file(url)


def read_bytes(url: str) -> bytes:
    """The whole file."""
    if is_remote(url):
        return object_store.read(url)
    with open(local_path(url), "rb") as file:
        return file.read()


def read_many(urls: Sequence[str]) -> dict[str, bytes]:
    """The files that exist, whole; remote ones are fetched side by side."""
    found: dict[str, bytes] = {}
    remote = [url for url in urls if is_remote(url)]
    if remote:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            found |= {url: data for url, data in pool.map(_read_if_there, remote) if data is not None}
    for url in urls:
        if not is_remote(url):
            with suppress(FileNotFoundError):
                found[url] = read_bytes(url)
    return found


def _read_if_there(url: str) -> tuple[str, bytes | None]:
    try:
        return url, read_bytes(url)
    except FileNotFoundError:
        return url, None


def read_range(url: str, offset: int, length: int, size: int | None = None, version: int = 0) -> bytes:
    """`length` bytes from `offset`; fewer than that in the file is an OSError that names the file.

    A remote file is read in pieces of at most 16 MiB, each resumed where it breaks off; it must have `size` bytes
    and be the `version` where these are given. Raises UserError for one that was changed, is gone or may not be read.
    """
    if is_remote(url):
        try:
            data = object_store.read(url, offset, offset + length, size, version) if length else b""
        except FileNotFoundError as error:
            raise UserError(f"{url} is gone ({error}); put it back") from error
    else:
        with activity.reading(url):
            descriptor = os.open(local_path(url), os.O_RDONLY)
            try:
                data = read_descriptor(descriptor, offset, length)
            finally:
                os.close(descriptor)
    if len(data) != length:
        raise OSError(errno.EIO, f"asked for bytes {offset}..{offset + length}, got {len(data)}", url)
    return data


def read_descriptor(descriptor: int, offset: int, length: int) -> bytes:
    """Like os.pread, but a short read goes on until the end of the file."""
    data = os.pread(descriptor, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    done = len(data)
    while parts[-1] and done < length:
        parts.append(os.pread(descriptor, length - done, offset + done))
        done += len(parts[-1])
    return b"".join(parts)


def open_bytes(url: str) -> BinaryIO:
    """The file opened for reading."""
    if is_remote(url):
        with store_errors(url):
            return cast(BinaryIO, filesystem(url).open(url, "rb"))
    return open(local_path(url), "rb")


def is_pattern(path: str) -> bool:
    """True for brace patterns ({00000..00031}) and shell patterns (*, ?, [)."""
    return PATTERN.search(path) is not None


def root_of(path: str) -> str:
    """The folder that a source's shard paths are relative to: what stands before the first pattern."""
    path = local_path(path)
    found = PATTERN.search(path)
    if found:
        return path[: found.start()].rpartition("/")[0]
    if path.endswith(SHARD_SUFFIX):
        return path.rpartition("/")[0]
    return path.rstrip("/")


def list_shards(path: str) -> list[str]:
    """Urls of the tars of a source.

    A folder gives the tars directly in it, sorted by name (not those of its subfolders: train/ and test/
    stand side by side); a brace pattern gives what it spells, in its order, without asking whether the files
    are there; `*` and `?` give what is there, sorted. Those of `file://` come without it. Raises UserError if nothing
    is found.
    """
    path = local_path(path)
    if is_pattern(path):
        return _expand(path)
    if path.endswith(SHARD_SUFFIX):
        return [path]
    return list_files(path, SHARD_SUFFIX)


def list_files(path: str, suffix: str) -> list[str]:
    """Urls of a folder's files that end in `suffix`, sorted by name. Raises UserError if there are none."""
    path = local_path(path)
    names = _folder(path)
    files = sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))
    if not files:
        raise UserError(f"{path} holds no {suffix} files{_near_miss(path, names, suffix)}")
    return [join(path, name) for name in files]


def _expand(path: str) -> list[str]:
    import braceexpand

    try:
        spelled = list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise UserError(
            f"{path} is no brace pattern ({error}); write for example data/{{00000..00031}}.tar"
        ) from None
    shards: list[str] = []
    for one in spelled:
        if not re.search(r"[*?\[]", one):
            shards.append(one)
        elif is_remote(one):
            shards += with_retries(one, partial(_matching, one))
        else:
            shards += sorted(glob.glob(one))
    if not shards:
        raise UserError(f"no file matches {path}; correct the pattern or make the data")
    return shards


def _matching(pattern: str, store: Any) -> list[str]:
    return sorted(store.unstrip_protocol(name) for name in store.glob(pattern))


def _listed(path: str, store: Any) -> list[str]:
    store.invalidate_cache()
    return [entry.rstrip("/").rpartition("/")[2] for entry in store.ls(path, detail=False)]


def _folder(path: str) -> list[str]:
    """Names in a folder; UserError if it is not there."""
    try:
        if is_remote(path):
            return with_retries(path, partial(_listed, path))
        return os.listdir(local_path(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except NotADirectoryError:
        raise UserError(f"{path} is a file, not a folder; name a folder, or a pattern of tars") from None
    except PermissionError as error:
        raise UserError(f"{path} may not be read: {error}") from None


def _near_miss(path: str, names: list[str], suffix: str) -> str:
    """What stands there instead of the files looked for, for the message."""
    packed = [name for name in names if re.search(r"\.(tar\.\w+|tgz)$", name)]
    if packed and suffix == SHARD_SUFFIX:
        return f"; {packed[0]} is compressed: unpack it to .tar, ranges of it cannot be read"
    if not is_remote(path):
        inside = {n: glob.escape(join(local_path(path), n)) for n in names}
        below = sorted(n for n, folder in inside.items() if glob.glob(join(folder, f"*{suffix}")))
        if below:
            return f"; its subfolders {', '.join(below[:5])} do: name one of them"
    if suffix == SHARD_SUFFIX:
        return "; name a folder of tars or a pattern such as data/{00000..00031}.tar"
    return "; name a folder that does"


@contextmanager
def publishing(path: str) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` only when the block ends well: whole or not at all, also
    after a power cut (written beside it, fsync, rename). An object store publishes on close by itself.

    Raises UserError where an object store refuses."""
    if is_remote(path):
        with store_errors(path), _refused(path):
            remote = filesystem(path).open(path, "wb")
            try:
                yield remote
            except BaseException:
                remote.discard()
                remote.closed = True  # else the garbage collector closes it, which would publish
                raise
            remote.close()
        return
    path = local_path(path)
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(
        folder, f".{os.path.basename(path)}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY}"
    )
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync(folder)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _refused(url: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        if error.filename is not None:  # a file's that was read meanwhile
            raise
        raise UserError(
            f"{url} may not be written ({error}); give the credentials in use the right to write it, or use others"
        ) from error


def publish(path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write `content`, bytes or a function that writes to a file, under `path` atomically; bytes into an object store
    with the patience of reads."""
    url = os.fspath(path)
    if is_remote(url) and isinstance(content, bytes):
        with_retries(url, partial(_put, url, content), to="write")
        return
    with publishing(url) as file:
        if callable(content):
            content(file)
        else:
            file.write(content)


def _put(url: str, content: bytes, store: Any) -> None:
    store.pipe_file(url, content)


def publish_table(path: str | os.PathLike[str], table: Any) -> None:
    """Write a pyarrow table as parquet, atomically."""
    import pyarrow.parquet as parquet

    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    publish(path, buffer.getvalue())


def below(root: str, url: str) -> str:
    """Path of `url` below `root`, with "/" separators."""
    return (
        str(PurePosixPath(url).relative_to(root))
        if root and not is_remote(url)
        else url.removeprefix(root).lstrip("/")
    )
