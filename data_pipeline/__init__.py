"""From bytes on disk or S3 to batches; `Stream` is the exact loader for anyone's loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.captions import CaptionSpec
    from data_pipeline.decode import ImageSpec
    from data_pipeline.errors import UserError
    from data_pipeline.spec import Batch, SourceSpec, TextSpec
    from data_pipeline.stream import Stream

__all__ = ["Batch", "CaptionSpec", "ImageSpec", "SourceSpec", "Stream", "TextSpec", "UserError"]

# Loaded on first use: light commands import this package without numpy.
_HOMES = {
    "Batch": "spec",
    "CaptionSpec": "captions",
    "ImageSpec": "decode",
    "SourceSpec": "spec",
    "Stream": "stream",
    "TextSpec": "spec",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
