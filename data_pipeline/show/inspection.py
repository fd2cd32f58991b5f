"""Detects the format of a path and dispatches to the inspector of that format."""

from __future__ import annotations

from typing import Any

from data_pipeline.formats import Format, detect
from data_pipeline.show.source_report import EXAMINED_FILES, SHOWN_RECORDS, SourceReport


def describe(
    path: str, examine: int = EXAMINED_FILES, first: int = SHOWN_RECORDS, images: str | None = None
) -> dict[str, Any]:
    """Return a JSON-able dict about a source in any of the formats that `formats.detect` knows.

    Examines `examine` files, evenly spaced over the source, and lists the `first` records. `images` is the folder of
    the images that an instruction file names; the default is the folder of that file. A damaged file becomes an
    entry of "problems". Raises UserError if the path does not exist or has no known format.
    """
    return inspect_source(path, examine, first, images).about


def inspect_source(
    path: str, examine: int = EXAMINED_FILES, first: int = SHOWN_RECORDS, images: str | None = None
) -> SourceReport:
    """Return the whole `SourceReport`: the dict of `describe` and the values that the HTML page plots."""
    form = detect(path)
    report = SourceReport(form, _empty(path, form))
    # Each inspector loads only what its formats need: `data show` starts in under half a second.
    if form.family == "tars":
        from data_pipeline.show.tars import inspect_tars

        inspect_tars(report, path, examine, first)
    else:
        from data_pipeline.show.records import inspect_records

        inspect_records(report, examine, first, images)
    for name in ("problems", "notes"):
        report.about[name] = list(dict.fromkeys(report.about[name]))
    return report


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
