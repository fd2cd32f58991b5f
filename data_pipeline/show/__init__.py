"""`dromos data show`: inspects a source of any known format and reports its content and its problems."""

from data_pipeline.show.inspection import describe, inspect_source
from data_pipeline.show.source_report import SourceReport
from data_pipeline.show.terminal import render

__all__ = ["SourceReport", "describe", "inspect_source", "render"]
