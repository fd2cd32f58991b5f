"""Dataset formats: `detect` returns the format of a path; each format has a module that streams its records."""

from data_pipeline.formats.detection import Format, detect

__all__ = ["Format", "detect"]
