"""Digests of tensors that threads compute piece by piece, and fingerprints of files too large to be read twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import xxhash

from pretrain.weights.byte_file import ByteFile
from pretrain.weights.dtypes import ELEMENTS_PER_SPAN

RULE = f"xxh64 of the xxh64 (8 bytes, big-endian) of every {ELEMENTS_PER_SPAN:,} elements as stored"
FILE_RULE = "xxh64 of the header and of its tensors' digests (8 bytes, big-endian) in the order of the file"
READ_RULE = "xxh64 of name, NUL, tensor's digest, newline for every tensor that was read, sorted by name"
SAMPLED_PAGES, PAGE_BYTES, EDGE_BYTES = 256, 4096, 1 << 20


def tensor_digest(spans: Iterable[bytes]) -> str:
    """From the xxh64 of each span of ELEMENTS_PER_SPAN elements, in order, as 8 bytes."""
    return xxhash.xxh64(b"".join(spans)).hexdigest()


def file_digest(header: bytes, tensors: Iterable[str]) -> str:
    """From its header, length prefix included, and its tensors' digests in the order of their places."""
    return xxhash.xxh64(header + b"".join(bytes.fromhex(digest) for digest in tensors)).hexdigest()


def combined_digest(tensors: Mapping[str, str]) -> str:
    """One digest for many tensors, by name."""
    listed = "".join(f"{name}\0{digest}\n" for name, digest in sorted(tensors.items()))
    return xxhash.xxh64(listed.encode()).hexdigest()


def fingerprint(file: ByteFile) -> str:
    """Size, and xxh64 of the first and last MiB and of 256 pages between them; of a remote file size and ETag.

    Training changes every page, so this tells weights apart without reading them all, and a copy of a file has that of
    the file. It does not find a change of a few bytes: the digests of the tensors do.
    """
    if file.remote:
        return file.identity
    end = max(EDGE_BYTES, file.size - EDGE_BYTES)
    places = range(EDGE_BYTES, end, max(PAGE_BYTES, (end - EDGE_BYTES) // SAMPLED_PAGES))
    ranges = [
        (0, min(EDGE_BYTES, file.size)),
        *((at, min(at + PAGE_BYTES, end)) for at in places),
        (end, file.size),
    ]
    digest = xxhash.xxh64()
    for start, stop in ranges:
        if start < stop:
            digest.update(file.peek(start, stop))
    return f"{file.size}-{digest.hexdigest()}"
