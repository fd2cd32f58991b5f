"""The two errors that carry meaning: a mistake of the user's, and a verdict on the content of a sample."""

from __future__ import annotations


class UserError(ValueError):
    """The user's input is wrong; the message says what, where and what to do. The command line exits with 2."""


class ContentError(Exception):
    """Complete bytes that are no usable sample; `reason` is a short slug that is counted, such as `undecodable`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ContentError], tuple[str, str]]:
        return ContentError, (self.reason, self.detail)


class ReadError(OSError):
    """Bytes could not be had after several tries. The data is never changed for it: the run stops and can go on."""


class WorkerError(OSError):
    """Rows could not be made: their processes died or hung, for no reason in the data. As after a ReadError, the data
    are never changed for it: the run stops and can go on.
    """
