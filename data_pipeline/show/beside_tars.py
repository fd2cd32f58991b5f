"""What stands beside the tars of a source: its index, its views, and the indexes of other tools."""

from __future__ import annotations

from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.show.source_report import Survey
from data_pipeline.sources.manifest import INDEX_FOLDER, Manifest
from data_pipeline.sources.offsets import Offsets, offsets_gone
from data_pipeline.sources.sidecars import INFO, SUFFIXES
from data_pipeline.sources.views import folder_of


def look(found: Survey, root: str, manifest: Manifest | None) -> None:
    """Fill in "index" (in use, unusable or none), "views" and "sidecars"; a view that is no longer one is a note."""
    about = found.about
    if manifest is not None and manifest.counted_by == "manifest":
        about["index"] = "in use" if _has_offsets(found, manifest) else "unusable"
    else:
        indexed = storage.exists(storage.join(storage.join(root, INDEX_FOLDER), "shards.parquet"))
        about["index"] = "unusable" if indexed else "none"
    about["views"] = [_view(found, name, manifest) for name in _views(root)] if manifest else []
    about["sidecars"] = _sidecars(root)


def _has_offsets(found: Survey, manifest: Manifest) -> bool:
    """Is the other half of the index there? A remote one is not fetched for this."""
    if manifest.offsets is None:
        return False
    try:
        if not storage.is_remote(manifest.offsets.url):
            Offsets(manifest)
        elif not storage.exists(manifest.offsets.url):
            raise offsets_gone(manifest.offsets.url)
    except UserError as error:
        found.problems.append(str(error))
        return False
    return True


def _views(root: str) -> list[str]:
    try:
        urls = storage.list_files(folder_of(root), ".parquet")
    except UserError:
        return []
    return [url.rpartition("/")[2].removesuffix(".parquet") for url in urls]


def _view(found: Survey, name: str, manifest: Manifest) -> dict[str, Any]:
    """Name, rule, and the samples it keeps, None if it is not one of these shards any more."""
    from data_pipeline.storage.parquet_table import read_table

    about: dict[str, Any] = {"name": name, "rule": None, "samples": None}
    try:
        about["samples"] = manifest.seen_through(name).samples
        about["rule"] = read_table(storage.join(folder_of(manifest.root), f"{name}.parquet"))[1].get("rule")
    except (UserError, ValueError) as error:
        found.notes.append(str(error))
    return about


def _sidecars(root: str) -> dict[str, int]:
    """Name or suffix -> number of files."""
    counts: dict[str, int] = {}
    for suffix in SUFFIXES:
        try:
            urls = storage.list_files(root, suffix)
        except UserError:
            continue
        # The longer suffixes come first and end in the shorter ones.
        fresh = [url for url in urls if not any(url.endswith(longer) for longer in counts)]
        if fresh:
            counts[suffix] = len(fresh)
    if storage.exists(storage.join(root, INFO)):
        counts[INFO] = 1
    return counts
