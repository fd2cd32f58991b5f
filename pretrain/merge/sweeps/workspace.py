"""Where a sweep or a soup works: results where its outputs go, also in a store; trials, logs and the lock on a disk."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.storage.files import is_remote, join, local_path, publish, read_bytes
from data_pipeline.storage.object_store import with_retries
from pretrain.merge.output.record import RECORD
from pretrain.merge.sweeps.scoring import Command, Figures, score
from pretrain.run.lock import FolderLock

LOGS = "logs"


class Workplace:
    """One command's place to work, held by one process at a time on this machine; a context manager.

    url:    where results and logs are to stand.
    folder: on a disk, for trials and logs: `url` itself, or for one in a store a folder below TMPDIR that belongs to
            `url` and `key`. That one goes at the end, and stays after an error, for the logs and to go on with.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/") or "/"
        self.remote = is_remote(url)
        if ":/" in url and not self.remote and not url.startswith("file://"):
            raise UserError(
                f"--out {url}: write s3://BUCKET/FOLDER, or a path without a colon before a slash"
            )
        self.folder = _own(f"{self.url}\n{key}") if self.remote else Path(local_path(self.url))
        self._lock: FolderLock | None = None

    def __enter__(self) -> Workplace:
        self._lock = FolderLock(self.folder, wait=0, where="--out")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        if self.remote and kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def read(self, name: str) -> bytes | None:
        """A file of results; None where there is none."""
        try:
            return read_bytes(join(self.url, name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def publish(self, name: str, content: str) -> None:
        try:
            publish(join(self.url, name), content.encode())
        except FileNotFoundError as error:
            if not self.remote:
                raise
            raise UserError(
                f"{self.url}: cannot be written: {error}; make the bucket, or correct its name"
            ) from error

    def remove(self) -> None:
        """All of it, results and logs too."""
        if self.remote:
            with_retries(self.url, lambda store: _remove_all(store, self.url), to="write")
        shutil.rmtree(self.folder)

    def score(self, command: Command, trial: Path, name: str) -> Figures:
        """The figures of a folder on the disk; what the command printed is in `logs`, also in the store."""
        log = self.folder / LOGS / name
        figures = score(command, trial, log)
        if self.remote:
            for path in (log.with_name(f"{log.name}.out"), log.with_name(f"{log.name}.err")):
                with open(path, "rb") as file:
                    publish(
                        join(self.url, f"{LOGS}/{path.name}"), lambda sent: shutil.copyfileobj(file, sent)
                    )
        return figures


def discard(trial: Path) -> None:
    """Remove a complete output of a merge; anything else is left alone."""
    if (trial / RECORD).is_file():
        shutil.rmtree(trial)


def _remove_all(store: Any, url: str) -> None:
    for path in store.find(url):
        store.rm_file(path)


def _own(key: str) -> Path:
    """A folder for `key` below TMPDIR, in one that only this user may look into."""
    base = Path(tempfile.gettempdir()) / f"dromos-{os.getuid()}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"{base}: is not a folder of this user alone; remove it, or set TMPDIR to another place"
        )
    return base / xxhash.xxh64_hexdigest(key.encode())
