"""Flushes files and the names in folders to disk, so that they outlive a power failure."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Errors that only a write has: full disk, quota, limit on file sizes.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch.save and safetensors raise errors of their own for a failed write.
HIDDEN = re.compile(
    r"PytorchStreamWriter|PyTorchStreamWriter|inline_container|basic_ios::clear|iostream error"
)
HIDDEN_CODE = re.compile(r"Os \{ code: (\d+)")
PROBE_BYTES = 1 << 20


@contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name `path` in the errors of writes in the block: Python and libraries raise some without a name.

    An error by which torch.save or safetensors hide the cause becomes the OSError that a write in the folder has now.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in NO_ROOM:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    except Exception as error:
        code = HIDDEN_CODE.search(str(error))
        if code:
            raise OSError(int(code[1]), os.strerror(int(code[1])), os.fspath(path)) from error
        if HIDDEN.search(str(error)):
            number = _error_of_a_write(path)
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise


def _error_of_a_write(path: str | os.PathLike[str]) -> int:
    """The errno of writing PROBE_BYTES in the folder `path`, or the nearest that exists; EIO if that succeeds."""
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    probe = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    try:
        with open(probe, "xb", buffering=0) as file:
            left = PROBE_BYTES
            while left:
                left -= file.write(bytes(left))
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        with suppress(OSError):
            os.unlink(probe)
    return errno.EIO


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder and its missing parents, if it does not exist, and flush their names to disk (fsync).

    Without that, a power failure could remove the folder together with files in it that were synced.
    """
    new: list[str] = []
    folder = os.path.abspath(path)
    while not os.path.lexists(folder):
        new.append(folder)
        folder = os.path.dirname(folder)
    os.makedirs(path, exist_ok=True)
    for folder in reversed(new):
        sync(os.path.dirname(folder))


def sync_tree(path: str | os.PathLike[str]) -> None:
    """Flush all files and folders below a folder, and its own entries, to disk (fsync)."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
