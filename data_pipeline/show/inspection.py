"""Detects the format of a path and dispatches to the right inspector."""

from __future__ import annotations

from typing import Any

from data_pipeline.formats import Format, detect
from data_pipeline.show.source_report import EXAMINE, FIRST, SourceReport


def describe(
    path: str, examine: int = EXAMINE, first: int = FIRST, images: str | None = None
) -> dict[str, Any]:
    """A plain, JSON-able dict about a source in any of the formats that `formats.detect` knows.

    Looks into `examine` files spread over the source and shows the `first` records; `images` is the folder of the
    pictures that an instruction file names, where it is not the file's own. What is wrong with a file stands in
    "problems" instead of being raised; only a path where nothing is, or nothing known, raises UserError.
    """
    return survey(path, examine, first, images).about


def survey(path: str, examine: int = EXAMINE, first: int = FIRST, images: str | None = None) -> SourceReport:
    """`describe` with the figures behind it."""
    form = detect(path)
    found = SourceReport(form, _empty(path, form))
    if form.family == "tars":
        from data_pipeline.show.tars import look

        look(found, path, examine, first)
    else:
        from data_pipeline.show.records import look as look_at_records

        look_at_records(found, examine, first, images)
    for name in ("problems", "notes"):
        found.about[name] = list(dict.fromkeys(found.about[name]))
    return found


def _empty(path: str, form: Format) -> dict[str, Any]:
    return {
        "path": path,
        "format": form.name,
        "kind": form.title,
        "shards": len(form.files),
        "samples": None,
        "bytes": 0,
        "counted_by": None,
        "first": [],
        "notes": [],
        "problems": [],
    }
