"""From bytes on disk or S3 to batches; `Stream` is the exact loader for anyone's loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.cache import CacheSettings
    from data_pipeline.captions import CaptionSpec
    from data_pipeline.decode import ImageSpec
    from data_pipeline.errors import ReadError, UserError, WorkerError
    from data_pipeline.spec import Batch, SourceSpec, TextSpec
    from data_pipeline.stall import StallLimits
    from data_pipeline.stream import Stream

__all__ = [
    "Batch",
    "CacheSettings",
    "CaptionSpec",
    "ImageSpec",
    "ReadError",
    "SourceSpec",
    "StallLimits",
    "Stream",
    "TextSpec",
    "UserError",
    "WorkerError",
]

# Loaded on first use: light commands import this package without numpy.
_HOMES = {
    "Batch": "spec",
    "CacheSettings": "cache",
    "CaptionSpec": "captions",
    "ImageSpec": "decode",
    "ReadError": "errors",
    "SourceSpec": "spec",
    "StallLimits": "stall",
    "Stream": "stream",
    "TextSpec": "spec",
    "UserError": "errors",
    "WorkerError": "errors",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
