"""Files and objects by URL: list, read ranges, publish atomically."""

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
from data_pipeline.storage.durable import make_folder, sync, write_errors
from data_pipeline.storage.object_store import filesystem, store_errors, with_retries

SHARD_SUFFIX = ".tar"
TEMPORARY = ".tmp"
PARALLEL_READS = 16  # small remote files that read_many fetches at the same time


class PathNotFoundError(UserError):
    """A file or folder that the user named does not exist."""


class NoFilesError(UserError):
    """A folder has no files with the suffix that was looked for."""


def is_remote(url: str) -> bool:
    """True for `s3://bucket/key` and every other fsspec protocol; `file://` counts as local."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> str:
    """The URL without `file://`; other URLs are returned unchanged."""
    return url.removeprefix("file://")


def join(root: str, path: str) -> str:
    """Join with "/", the separator of local and remote paths; an empty `root` gives `path` alone."""
    return f"{root.rstrip('/')}/{path}" if root else path


def exists(url: str) -> bool:
    if not is_remote(url):
        return os.path.exists(local_path(url))
    return bool(with_retries(url, lambda store: store.exists(url)))


def size(url: str) -> int:
    """Size in bytes. Raises FileNotFoundError."""
    if not is_remote(url):
        return os.stat(local_path(url)).st_size
    return int(with_retries(url, lambda store: store.size(url)))


def sizes(urls: Sequence[str], tags: dict[str, int] | None = None) -> dict[str, int]:
    """Size in bytes of each file that exists. A remote folder is listed once, without one request per file.

    Adds the version of each remote file to `tags` (see object_store.version_of). Raises UserError for a path that is
    not a regular file.
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
                    raise UserError(f"{url} is not a regular file; remove it, or narrow the pattern")
                found[url] = status.st_size
    return {url: found[url] for url in urls if url in found}


def _entries(folder: str, store: Any) -> dict[str, dict[str, Any]]:
    return {store.unstrip_protocol(entry["name"]): entry for entry in store.ls(folder, detail=True)}


def remove(urls: Sequence[str]) -> None:
    """Delete files; a file that does not exist is no error."""
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
    """Content of each file that exists; remote files are fetched in parallel."""
    found: dict[str, bytes] = {}
    remote = [url for url in urls if is_remote(url)]
    if remote:
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            found |= {url: data for url, data in pool.map(_read_if_exists, remote) if data is not None}
    for url in urls:
        if not is_remote(url):
            with suppress(FileNotFoundError):
                found[url] = read_bytes(url)
    return found


def _read_if_exists(url: str) -> tuple[str, bytes | None]:
    try:
        return url, read_bytes(url)
    except FileNotFoundError:
        return url, None


def read_range(url: str, offset: int, length: int, size: int | None = None, version: int = 0) -> bytes:
    """Read `length` bytes from `offset`. Raises OSError with the file's name if the file ends earlier.

    A remote file is read in requests of at most 16 MiB; an interrupted one resumes at the failed byte. The object must
    match `size` and `version` if they are given. Raises UserError if a remote file has changed, is gone or may not be
    read, ReadError when all retries fail.
    """
    if is_remote(url):
        try:
            data = object_store.read(url, offset, offset + length, size, version) if length else b""
        except FileNotFoundError as error:
            raise UserError(f"{url} is gone ({error}); restore it") from error
    else:
        with activity.reading(url):
            descriptor = os.open(local_path(url), os.O_RDONLY)
            try:
                data = read_descriptor(descriptor, offset, length)
            finally:
                os.close(descriptor)
    if len(data) != length:
        raise OSError(
            errno.EIO, f"requested bytes {offset} to {offset + length}, received {len(data)} bytes", url
        )
    return data


def read_descriptor(descriptor: int, offset: int, length: int) -> bytes:
    """Like os.pread, but repeats short reads: returns fewer bytes only at the end of the file."""
    data = os.pread(descriptor, length, offset)
    if len(data) == length:
        return data
    chunks = [data]
    done = len(data)
    while chunks[-1] and done < length:
        chunks.append(os.pread(descriptor, length - done, offset + done))
        done += len(chunks[-1])
    return b"".join(chunks)


def open_bytes(url: str) -> BinaryIO:
    """Open the file for reading."""
    if is_remote(url):
        with store_errors(url):
            return cast(BinaryIO, filesystem(url).open(url, "rb"))
    return open(local_path(url), "rb")


def list_files(path: str, suffix: str) -> list[str]:
    """URLs of the files in a folder that end in `suffix`, sorted by name.

    Raises PathNotFoundError if the folder does not exist, NoFilesError if it has no such file.
    """
    path = local_path(path)
    names = _folder_names(path)
    files = sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))
    if not files:
        raise NoFilesError(f"{path} holds no {suffix} files{_advice(path, names, suffix)}")
    return [join(path, name) for name in files]


def _list_remote(path: str, store: Any) -> list[str]:
    store.invalidate_cache()
    return [entry.rstrip("/").rpartition("/")[2] for entry in store.ls(path, detail=False)]


def _folder_names(path: str) -> list[str]:
    """Names of the entries of a folder. Raises UserError if it does not exist, is a file or is not readable."""
    try:
        if is_remote(path):
            return with_retries(path, partial(_list_remote, path))
        return os.listdir(local_path(path))
    except FileNotFoundError:
        raise PathNotFoundError(f"{path} does not exist") from None
    except NotADirectoryError:
        raise UserError(f"{path} is a file, not a folder; name a folder, or a pattern of tars") from None
    except PermissionError as error:
        raise UserError(f"permission denied reading {path}: {error}") from None


def _advice(path: str, names: list[str], suffix: str) -> str:
    """End of the NoFilesError message: what to do, given the `names` that the folder does have."""
    compressed = [name for name in names if re.search(r"\.(tar\.\w+|tgz)$", name)]
    if compressed and suffix == SHARD_SUFFIX:
        return f"; {compressed[0]} is compressed: unpack it to .tar, because ranges of it cannot be read"
    if not is_remote(path):
        patterns = {name: glob.escape(join(local_path(path), name)) for name in names}
        subfolders = sorted(n for n, folder in patterns.items() if glob.glob(join(folder, f"*{suffix}")))
        if subfolders:
            return f"; {suffix} files are in the subfolders {', '.join(subfolders[:5])}; choose one of them"
    if suffix == SHARD_SUFFIX:
        return "; name a folder of tars or a pattern such as data/{00000..00031}.tar"
    return f"; choose a folder that contains {suffix} files"


@contextmanager
def publishing(path: str) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under `path` only if the block succeeds.

    A local file is written beside its target, synced and renamed, so that it is whole also after a power failure. An
    object store publishes an object when it is closed. Raises UserError if the store denies the write.
    """
    if is_remote(path):
        with store_errors(path), _write_permission(path):
            remote = filesystem(path).open(path, "wb")
            try:
                yield remote
            except BaseException:
                remote.discard()
                remote.closed = True  # otherwise the garbage collector would close it, and so publish it
                raise
            remote.close()
        return
    path = local_path(path)
    folder = os.path.dirname(path) or "."
    make_folder(folder)
    temporary = os.path.join(
        folder, f".{os.path.basename(path)}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY}"
    )
    try:
        with write_errors(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == temporary and error.filename2 is None:
            error.filename = path  # the name that the user knows
        raise
    sync(folder)


@contextmanager
def _write_permission(url: str) -> Iterator[None]:
    """Turn a PermissionError of the store into a UserError."""
    try:
        yield
    except PermissionError as error:
        if error.filename is not None:  # the error is about a local file that the block reads
            raise
        raise UserError(
            f"permission denied writing {url} ({error}); grant write access to the credentials in use, or use others"
        ) from error


def publish(path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write `path` atomically; `content` is bytes or a function that writes to an open file.

    Bytes for an object store are retried as reads are; a function is called only once.
    """
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


def path_below(root: str, url: str) -> str:
    """Path of `url` relative to `root`, with "/" separators."""
    return (
        str(PurePosixPath(url).relative_to(root))
        if root and not is_remote(url)
        else url.removeprefix(root).lstrip("/")
    )
