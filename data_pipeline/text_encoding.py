"""Bytes to text: a byte order mark decides the encoding, all other text must be UTF-8, and NUL is refused.

Text in another encoding is a verdict on the content. Decoding it with replacement characters would train on them.
"""

from __future__ import annotations

from data_pipeline.errors import ContentError

BOM = "\ufeff"
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
UTF32_BOMS = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
# Reasons of a ContentError.
NOT_UTF8, HAS_NUL = "not UTF-8", "NUL in text"
ADVICE = "write it again as UTF-8"


def decode_text(data: bytes) -> str:
    """The text of a file or tar member, without byte order mark: UTF-16 if it begins with that mark, else UTF-8.

    Raises ContentError: `not UTF-8`, `NUL in text`.
    """
    try:
        text = (
            data.decode()
        )  # marks of UTF-16 are not valid UTF-8, so text without fault needs no check for them
    except UnicodeDecodeError as error:
        text = _decode_utf16(data, error)
    return text if text[:1] != BOM and "\0" not in text else _checked(text)


def decode_line(line: bytes) -> str:
    """One line of a UTF-8 file, without byte order mark: files that were joined have marks inside.

    Raises ContentError: `not UTF-8`, `NUL in text`.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None
    return text if text[:1] != BOM and "\0" not in text else _checked(text)


def check_text(text: str) -> str:
    """A text that was parsed from JSON or a table, without byte order mark.

    Raises ContentError: `not UTF-8` for a lone surrogate, which JSON can write as `\\ud800` and UTF-8 cannot;
    `NUL in text`.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ContentError(
                NOT_UTF8, f"character {error.start} is half of a surrogate pair; {ADVICE}"
            ) from None
    return text if text[:1] != BOM and "\0" not in text else _checked(text)


def without_bom(data: bytes) -> bytes:
    """UTF-8 bytes without the byte order mark at their start, also if it is there twice."""
    while data.startswith(UTF8_BOM):
        data = data[len(UTF8_BOM) :]
    return data


def is_utf16(start: bytes) -> bool:
    """True if a file that begins with these bytes (at least 4, if it has them) has UTF-16's byte order mark."""
    return start[:2] in UTF16_BOMS and start[:4] not in UTF32_BOMS


def _checked(text: str) -> str:
    text = text.lstrip(BOM)  # some tools add a second mark
    at = text.find("\0")
    if at < 0:
        return text
    # Text of Latin letters in UTF-16 is valid UTF-8 in which every other character is NUL.
    likely = "UTF-16 or UTF-32 without a byte order mark" if text.count("\0") >= len(text) // 3 else ""
    hint = f"perhaps it is {likely}; {ADVICE}" if likely else "remove it, or write the text again"
    raise ContentError(HAS_NUL, f"character {at} is NUL; {hint}")


def _decode_utf16(data: bytes, fault: UnicodeDecodeError) -> str:
    """The text after a byte order mark of UTF-16. Raises ContentError for any other bytes: `fault` says why."""
    if not is_utf16(data[:4]):
        raise _not_utf8(fault) from None
    try:
        return data.decode("utf-16")
    except UnicodeDecodeError as error:
        raise ContentError(
            NOT_UTF8, f"a byte order mark of UTF-16, but byte {error.start} is no UTF-16; {ADVICE}"
        ) from None


def _not_utf8(fault: UnicodeDecodeError) -> ContentError:
    if fault.object[:4] in UTF32_BOMS:
        return ContentError(NOT_UTF8, f"a byte order mark of UTF-32; {ADVICE}")
    return ContentError(NOT_UTF8, f"byte {fault.start} is 0x{fault.object[fault.start]:02x}; {ADVICE}")
