"""Tensor digests, computed span by span in parallel, and file fingerprints that do not read the whole file.

The texts of the rules are part of merge.json.
"""

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
    """Digest of a tensor from the xxh64 (8 bytes) of each span of ELEMENTS_PER_SPAN elements, in order."""
    return xxhash.xxh64(b"".join(spans)).hexdigest()


def file_digest(header: bytes, tensors: Iterable[str]) -> str:
    """Digest of a file from its header (with the length prefix) and its tensor digests in file order."""
    return xxhash.xxh64(header + b"".join(bytes.fromhex(digest) for digest in tensors)).hexdigest()


def combined_digest(tensors: Mapping[str, str]) -> str:
    """One digest of many tensors, from name -> digest."""
    listed = "".join(f"{name}\0{digest}\n" for name, digest in sorted(tensors.items()))
    return xxhash.xxh64(listed.encode()).hexdigest()


def fingerprint(file: ByteFile) -> str:
    """Size plus xxh64 of the first MiB, the last MiB and 256 pages between them; size and ETag of a remote file.

    Training changes every page, so the fingerprint distinguishes weights without a full read, and a copy has the
    fingerprint of its original. A change of a few bytes may go undetected; the tensor digests detect it.
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
