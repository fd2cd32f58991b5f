"""`BadRecord`, which a reader yields in place of an unusable record, and the check of image paths from records."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_pipeline import storage
from data_pipeline.errors import ContentError

UNSAFE = "unsafe image path"
# Control characters, and lone surrogates, which replace bytes that are not UTF-8 (see text_records.py).
CONTROL_OR_SURROGATE = re.compile("[\x00-\x1f\ud800-\udfff]")
URL_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class BadRecord:
    """An unusable record: `place` ("line 3", "row 17") of the file `where`. Equal `reason`s are counted together."""

    where: str
    place: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}, {self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def check_image_path(path: str, root: str | None = None) -> str:
    """Return an image path from a record, relative to the image folder `root`, normalised, with "/" separators.

    An absolute path is accepted only below `root`, which the user named. Raises ContentError `unsafe image path` for
    any other absolute path, `..`, a URL, a drive, a home folder or a control character, and `missing image` for "".
    """
    if not path.strip():
        raise ContentError("missing image", "an empty path")
    shown = repr(path[:120])
    if CONTROL_OR_SURROGATE.search(path):
        raise ContentError(UNSAFE, f"{shown} contains a control character or is not UTF-8")
    if "\\" in path:
        raise ContentError(UNSAFE, f"{shown} contains a backslash")
    if root and path.startswith(root.rstrip("/") + "/"):
        path = path[len(root.rstrip("/")) + 1 :]
    if path.startswith(("/", "~")) or URL_SCHEME.match(path):
        raise ContentError(UNSAFE, f"{shown} is not a relative path below the image folder")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or not parts:
        raise ContentError(UNSAFE, f"{shown} leaves the image folder")
    return "/".join(parts)


def image_url(path: str, root: str) -> str:
    """URL of an image below the image folder `root`. Raises ContentError as `check_image_path` does."""
    return storage.join(root, check_image_path(path, root))
