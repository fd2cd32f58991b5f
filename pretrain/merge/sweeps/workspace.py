"""Working directory of a sweep or soup: results, trial merges, logs, lock.

Results and logs are published where the outputs go, on a disk or in an object store. Trial merges and the lock are
always on a disk, because the scoring command needs local files.
"""

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
from pretrain.merge.sweeps.scoring import Command, Metrics, score
from pretrain.run.lock import FolderLock

LOGS = "logs"


class Workspace:
    """The working directory of one command; as a context manager it is locked against other processes of this machine.

    url:    where results and logs are published.
    folder: local folder of trials and logs. On a disk it is `url` itself. For a `url` in a store it is a folder below
            TMPDIR, named by a hash of `url` and `key`; it is removed at the end, and kept after an error, so that its
            logs can be read and the next call resumes from it.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/") or "/"
        self.remote = is_remote(url)
        if ":/" in url and not self.remote and not url.startswith("file://"):
            raise UserError(
                f"--out {url}: write s3://BUCKET/FOLDER, or a path without a colon before a slash"
            )
        self.folder = _private_folder(f"{self.url}\n{key}") if self.remote else Path(local_path(self.url))
        self._lock: FolderLock | None = None

    def __enter__(self) -> Workspace:
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
        """A result file; None if it does not exist."""
        try:
            return read_bytes(join(self.url, name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def publish(self, name: str, content: str) -> None:
        """Write a result file. Raises UserError if the bucket does not exist."""
        try:
            publish(join(self.url, name), content.encode())
        except FileNotFoundError as error:
            if not self.remote:
                raise
            raise UserError(
                f"{self.url}: cannot be written: {error}; create the bucket, or correct its name"
            ) from error

    def remove(self) -> None:
        """Remove everything, results and logs too."""
        if self.remote:
            with_retries(self.url, lambda store: _remove_all(store, self.url), to="write")
        shutil.rmtree(self.folder)

    def score(self, command: Command, trial: Path, name: str) -> Metrics:
        """The metrics of a local folder. The output of the command goes to `logs`, in a store too."""
        log = self.folder / LOGS / name
        metrics = score(command, trial, log)
        if self.remote:
            for path in (log.with_name(f"{log.name}.out"), log.with_name(f"{log.name}.err")):
                with open(path, "rb") as file:
                    publish(
                        join(self.url, f"{LOGS}/{path.name}"), lambda target: shutil.copyfileobj(file, target)
                    )
        return metrics


def discard(trial: Path) -> None:
    """Remove a complete output of a merge; leave any other folder alone."""
    if (trial / RECORD).is_file():
        shutil.rmtree(trial)


def _remove_all(store: Any, url: str) -> None:
    for path in store.find(url):
        store.rm_file(path)


def _private_folder(key: str) -> Path:
    """Path of the folder for `key`, inside a folder below TMPDIR that only this user can access."""
    base = Path(tempfile.gettempdir()) / f"dromos-{os.getuid()}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = base.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(
            f"{base}: is not a private folder of this user; remove it, or set TMPDIR to another folder"
        )
    return base / xxhash.xxh64_hexdigest(key.encode())
