"""What a file is, from its first bytes: tar, compressed, a git-lfs pointer, a web page, parquet, cut off, empty."""

from __future__ import annotations

import re

BLOCK = 512  # bytes of a tar header
HEAD_BYTES = 1024  # enough for every kind
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# First bytes -> kind.
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"PAR1": "parquet",
    LFS_POINTER: "lfs",
}
# Kind -> the program that unpacks it to its output.
COMPRESSED = {
    "gzip": "gzip -dc",
    "bzip2": "bzip2 -dc",
    "zstd": "zstd -dc",
    "xz": "xz -dc",
    "lz4": "lz4 -dc",
    "lzma": "xz --format=lzma -dc",
    "compress": "gzip -dc",
}
MARKUP = re.compile(rb"\s*(<!doctype\s+html|<html|<head|<body|<!--)", re.IGNORECASE)
XML = re.compile(rb"\s*(<\?xml|<error>|<listbucketresult)", re.IGNORECASE)
BOMS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def file_kind(head: bytes, size: int | None = None) -> str:
    """Kind of a file from its first bytes, HEAD_BYTES or all of a smaller one.

    "tar", a value of MAGIC, "html", "xml", "json", "empty", "zeros", "truncated" (shorter than a tar's header, with
    zeros in it) or "unknown". `size` is the size of the file in bytes, if known.
    """
    if size == 0 or not head:
        return "empty"
    if _is_header(
        head[:BLOCK]
    ):  # first, because the name of the first member may begin as a magic number does
        return "tar"
    if (
        head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50
    ):  # a frame before those of zstd, as pzstd writes
        return "zstd"
    if head.startswith(b"]\0\0") and head[3:13].strip(
        b"\0"
    ):  # old lzma has no magic: its settings, then the size
        return "lzma"
    kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    if kind is not None:
        return kind
    if not head.strip(b"\0"):
        return "zeros"
    text = head
    for bom in BOMS:
        text = text.removeprefix(bom)
    text = text.replace(b"\0", b"") if len(text) < len(head) else text  # UTF-16 of ASCII
    if MARKUP.match(text):
        return "html"
    if XML.match(text):
        return "xml"
    if text.lstrip()[:1] in (b"{", b"[") and b"\0" not in text:
        return "json"
    return "truncated" if len(head) < BLOCK and b"\0" in head else "unknown"


def describe_kind(kind: str, where: str) -> str | None:
    """A sentence about a file that should be a tar and is of another kind; None if the kind says nothing.

    Names the file, and the command or the step that helps.
    """
    name = where.rpartition("/")[2]
    if kind in COMPRESSED:
        plain = re.sub(r"(\.tar)?(\.\w+)?$", "", name) + ".unpacked.tar"
        return (
            f"{where} is compressed with {kind}; unpack it, because ranges of it cannot be read: "
            f"{COMPRESSED[kind]} < {_quoted(name)} > {_quoted(plain)}, then remove it"
        )
    if kind in ("zip", "7z", "rar"):
        return (
            f"{where} is a {kind} archive; unpack it, and write its files to a tar, sorted by name: "
            "tar --sort=name -cf"
        )
    return {
        "lfs": f"{where} is a git-lfs pointer, not the file itself; fetch it in its repository with: git lfs pull",
        "html": f"{where} is a web page (HTML), probably the answer to a download that was refused; open it with a "
        "text editor, then fetch the file again",
        "xml": f"{where} is XML, probably the error of an object store in place of the file; open it with a text "
        "editor, then fetch the file again",
        "json": f"{where} is JSON, not a tar; correct the path, or fetch the file again",
        "parquet": f"{where} is a parquet file, not a tar; give it the suffix .parquet: mv {_quoted(name)} "
        f"{_quoted(name.removesuffix('.tar') + '.parquet')}",
        "empty": f"{where} is empty (0 bytes); make it again or remove it",
    }.get(kind)


def _is_header(block: bytes) -> bool:
    """True for a tar header: its checksum agrees, as an unsigned or a signed sum."""
    if len(block) < BLOCK:
        return False
    field = block[148:156].split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]+", field):
        return False
    return int(field, 8) in checksums(block)


def checksums(header: bytes) -> tuple[int, int]:
    """Sum of a header's bytes as unsigned and as signed numbers; its checksum field counts as blanks."""
    counted = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(counted)
    return unsigned, unsigned - 256 * sum(byte > 127 for byte in counted)


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.+-]+", name) else "'" + name.replace("'", "'\\''") + "'"
