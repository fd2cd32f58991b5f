"""Reads the members of one sample of a tar, and summarises them for the list of first samples."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import ContentError
from data_pipeline.show.source_report import shorten
from data_pipeline.sources.tar import Sample
from data_pipeline.transforms.captions import json_member, pick_caption

MAX_HEADERS_BYTES = 64 << 10  # of headers between the members of a sample
LISTED_EXTENSIONS = 32


def read_members(url: str, sample: Sample) -> dict[str, bytes]:
    """Read one sample as {extension: content}. Its members are adjacent in the tar, so one read is enough.

    Members that are hard links to others may be far away; then each is read alone.
    """
    if not sample.members:
        return {}
    start = min(offset for offset, _ in sample.members.values())
    stop = max(offset + length for offset, length in sample.members.values())
    if stop - start > 2 * sum(length for _, length in sample.members.values()) + MAX_HEADERS_BYTES:
        return {name: storage.read_range(url, *place) for name, place in sample.members.items()}
    span = storage.read_range(url, start, stop - start)
    return {
        extension: span[offset - start : offset - start + length]
        for extension, (offset, length) in sample.members.items()
    }


def summarize(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    """Return the key, the member sizes in bytes and the caption; for packed text, its documents and array shape."""
    summary: dict[str, Any] = {
        "key": key,
        "members": {name: len(data) for name, data in sorted(members.items())[:LISTED_EXTENSIONS]},
    }
    if "npy" in members:
        summary["tokens"] = _array_shape(members["npy"])
        documents = json_fields(members).get("documents")
        listed = documents if isinstance(documents, list) else []
        summary["caption"] = ", ".join(str(d.get("url", "")) for d in listed if isinstance(d, dict))
    else:
        summary["caption"] = shorten(default_caption(members))
    return summary


def default_caption(members: dict[str, bytes]) -> str:
    """Return the first caption of those that training draws from by default; "" if there is none."""
    with suppress(ContentError):
        return pick_caption(members, None)[0]
    return ""


def json_fields(members: dict[str, bytes]) -> dict[str, Any]:
    """Return the json member; an empty dict if it is absent, malformed or not an object."""
    with suppress(ContentError):
        return json_member(members)
    return {}


def _array_shape(data: bytes) -> str:
    import numpy as np

    try:
        row = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError):
        return "not an array"
    return f"{row.dtype} {list(row.shape)}"
