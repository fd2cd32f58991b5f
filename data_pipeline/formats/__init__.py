"""What each public format looks like: records, readers that stream, and `detect`, which tells them apart."""

from data_pipeline.formats.detection import Format, detect

__all__ = ["Format", "detect"]
