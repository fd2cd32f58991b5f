"""What a reader yields in the place of a record that cannot be used: where it stands and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_pipeline import storage
from data_pipeline.errors import ContentError

UNSAFE = "unsafe image path"
# Control characters, and what is left of bytes that are no UTF-8.
ODD = re.compile("[\x00-\x1f\ud800-\udfff]")
SURROGATE = re.compile("[\ud800-\udfff]")
SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class BadRecord:
    """`place` is "line 3" or "row 17" of the file `where`; `reason` is a short slug that is counted."""

    where: str
    place: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}, {self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def check_image_path(path: str, root: str | None = None) -> str:
    """The path below `root`, with / between its parts.

    An absolute path is taken if it lies below `root`, which is what the user gave. Raises ContentError `unsafe
    image path` for any other, for `..`, a url, a drive, a home folder, or a control character, and `missing
    image` for "".
    """
    if not path.strip():
        raise ContentError("missing image", "an empty path")
    shown = repr(path[:120])
    if ODD.search(path):
        raise ContentError(UNSAFE, f"{shown} holds a control character or no UTF-8")
    if "\\" in path:
        raise ContentError(UNSAFE, f"{shown} holds a backslash")
    if root and path.startswith(root.rstrip("/") + "/"):
        path = path[len(root.rstrip("/")) + 1 :]
    if path.startswith(("/", "~")) or SCHEME.match(path):
        raise ContentError(UNSAFE, f"{shown} is no path below the folder of pictures")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise ContentError(UNSAFE, f"{shown} leaves the folder of pictures")
    return "/".join(parts)


def image_url(path: str, root: str) -> str:
    """Where the picture lies. Raises ContentError as `check_image_path` does."""
    return storage.join(root, check_image_path(path, root))
