"""`dromos data show`: what a source is, for a person, and what is wrong with it."""

from data_pipeline.show.inspection import describe, survey
from data_pipeline.show.source_report import SourceReport
from data_pipeline.show.terminal import render

__all__ = ["SourceReport", "describe", "render", "survey"]
