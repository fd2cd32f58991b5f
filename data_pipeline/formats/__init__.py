"""Public face of the dataset formats: `detect` tells the format of a path; each format has a module that streams it."""

from data_pipeline.formats.detection import Format, detect

__all__ = ["Format", "detect"]
