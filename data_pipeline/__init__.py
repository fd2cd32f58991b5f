"""From bytes on disk or S3 to collated batches. `Stream` is the loader for any training loop.

The names below are the public interface; every other module is internal and may move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.batches.spec import Batch, SourceSpec
    from data_pipeline.errors import ContentError, ReadError, UserError, WorkerError
    from data_pipeline.storage.cache import CacheSettings
    from data_pipeline.stream import Stream
    from data_pipeline.transforms.captions import CaptionSpec
    from data_pipeline.transforms.decode import ImageSpec
    from data_pipeline.transforms.text_formats import PackedFormat, RowArray, TextFormat, TextRow, TextSpec
    from data_pipeline.workers.watchdog import StallLimits

__all__ = [
    "Batch",
    "CacheSettings",
    "CaptionSpec",
    "ContentError",
    "ImageSpec",
    "PackedFormat",
    "ReadError",
    "RowArray",
    "SourceSpec",
    "StallLimits",
    "Stream",
    "TextFormat",
    "TextRow",
    "TextSpec",
    "UserError",
    "WorkerError",
]

# Submodule of each name, imported on first use: light commands import this package without numpy.
_HOMES = {
    "Batch": "batches.spec",
    "CacheSettings": "storage.cache",
    "CaptionSpec": "transforms.captions",
    "ContentError": "errors",
    "ImageSpec": "transforms.decode",
    "PackedFormat": "transforms.text_formats",
    "ReadError": "errors",
    "RowArray": "transforms.text_formats",
    "SourceSpec": "batches.spec",
    "StallLimits": "workers.watchdog",
    "Stream": "stream",
    "TextFormat": "transforms.text_formats",
    "TextRow": "transforms.text_formats",
    "TextSpec": "transforms.text_formats",
    "UserError": "errors",
    "WorkerError": "errors",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
