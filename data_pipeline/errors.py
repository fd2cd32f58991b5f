"""The errors of this package, one per cause: user input, sample content, storage, worker processes.

A retry after a UserError or a ContentError fails again. A retry after a ReadError or a WorkerError may succeed.
"""

from __future__ import annotations

MAX_DETAIL = 1000  # a sample can have thousands of members, whose names a message would list


class UserError(ValueError):
    """The user's input is invalid. The message says what, where and what to do; the command line exits with code 2."""


class ContentError(Exception):
    """A sample was read completely, but its content is unusable; another sample replaces it.

    reason: a short category, such as `undecodable`, under which replaced samples are counted
    detail: one line for bad_samples.jsonl, the same on every run; it may quote the sample, so it is cut to MAX_DETAIL
        characters, and characters that would move the cursor of a terminal become blanks
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = "".join(letter if letter.isprintable() else " " for letter in detail)
        detail = detail if len(detail) <= MAX_DETAIL else f"{detail[: MAX_DETAIL - 3]}..."
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ContentError], tuple[str, str]]:
        return ContentError, (self.reason, self.detail)


class ReadError(OSError):
    """Bytes could not be read after several tries. No sample is replaced: the run stops and can be resumed."""


class WorkerError(OSError):
    """Worker processes died or hung for a reason outside the data.

    As after a ReadError, no sample is replaced: the run stops and can be resumed.
    """
