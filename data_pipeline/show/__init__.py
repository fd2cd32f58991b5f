"""`dromos data show`: what a source is, for a person, and what is wrong with it."""

from data_pipeline.show.layout import render
from data_pipeline.show.survey import Survey, describe, survey

__all__ = ["Survey", "describe", "render", "survey"]
