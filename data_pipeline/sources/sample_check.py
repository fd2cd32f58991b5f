"""The one verdict on a sample, for training and `data show`. How to decode and to read text is handed in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from data_pipeline.errors import ContentError
from data_pipeline.sources.tar import image_member

Image = TypeVar("Image")
Text = TypeVar("Text")
# A run reads so many samples of each source before its first step, and refuses a source if all of them are unusable.
SAMPLES_AT_START = 8


def read_sample(
    members: Mapping[str, bytes],
    decode: Callable[[bytes], Image] | None,
    read_text: Callable[[Mapping[str, bytes]], Text] | None,
) -> tuple[Image | None, Text | None]:
    """The decoded image and the text of a sample with these members (extension -> bytes).

    `decode` and `read_text` are None where a stream has no images or no text. Raises ContentError if the sample is
    unusable: `missing image`, or what `decode` and `read_text` raise.
    """
    image = decode(image_bytes(members)) if decode is not None else None
    return image, read_text(members) if read_text is not None else None


def image_bytes(members: Mapping[str, bytes]) -> bytes:
    """The image file of a sample. Raises ContentError `missing image`."""
    extension = image_member(members)
    if extension is None:
        raise ContentError("missing image", f"members: {', '.join(members) or 'none'}")
    return members[extension]


def lacks_image(extensions: Collection[str]) -> bool:
    """True if a sample with these members is unusable for lack of an image, whatever their content is."""
    return image_member(extensions) is None


def lacks_caption(extensions: Collection[str]) -> bool:
    """True if a sample with these members has no caption where training looks for one by default."""
    return "txt" not in extensions and "json" not in extensions
