"""Tokenises documents, packs them end to end into rows of fixed length, and writes the rows as tars."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.formats import refinedweb
from data_pipeline.sources.tar import TarWriter
from data_pipeline.transforms.tokenizers import Tokenizer, load_tokenizer

SUMMARY = "packed.json"
ROWS_PER_SHARD = 10_000


@dataclass
class PackingSummary:
    """Contents of packed.json; tokens = rows x length + tail_tokens."""

    length: int
    tokenizer: str
    vocabulary: int
    dtype: str
    documents: int = 0
    empty_documents: int = 0
    characters: int = 0
    tokens: int = 0
    rows: int = 0
    shards: int = 0
    tail_tokens: int = 0


@dataclass
class _Row:
    """A row that is being filled, and the document parts that it contains."""

    ids: list[int] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)


def pack(
    source: str, out: str, tokenizer: str, length: int, rows_per_shard: int = ROWS_PER_SHARD
) -> PackingSummary:
    """Pack the RefinedWeb parquet files of `source` into tars in `out`; returns the summary.

    A document becomes start + ids + end; documents follow each other in file order. A sample of the tars is KEY.npy,
    uint16 or uint32 `[length]`, and KEY.json, {"documents": [{url, start, tokens}]}. Each tar has a `_stats.json` with
    its count and the fingerprint of the tokenizer. The last tokens, fewer than `length`, make no row; packed.json,
    written last, counts them as tail_tokens. Raises UserError if `out` has tars already, if `length` is below 2, or if
    the text is too short for one row.
    """
    encoder = load_tokenizer(tokenizer)
    _check_no_tars(out)
    if length < 2:
        raise UserError(f"the length of packed rows is {length}; it must be at least 2 tokens")
    dtype = np.dtype("<u2") if encoder.vocab_size <= 1 << 16 else np.dtype("<u4")
    summary = PackingSummary(length, encoder.fingerprint, encoder.vocab_size, dtype.name)
    rows = _rows(refinedweb.documents(source), encoder, length, summary)
    for shard, part in enumerate(_chunks(rows, rows_per_shard)):
        _write_shard(storage.join(out, f"{shard:05d}"), shard, part, dtype, summary, rows_per_shard)
        summary.shards += 1
        summary.rows += len(part)
    if not summary.rows:
        raise UserError(
            f"{source} has {summary.tokens} tokens, fewer than one row of {length}; add more text"
        )
    storage.publish(storage.join(out, SUMMARY), json.dumps(asdict(summary), indent=2).encode())
    return summary


def _check_no_tars(out: str) -> None:
    # Shards of an earlier packing would remain among the new ones, and training would read them.
    try:
        shards = storage.list_shards(out)
    except UserError:
        return
    raise UserError(f"{out} has {len(shards)} tars already; remove them or choose another folder")


def _rows(
    documents: Iterable[tuple[str, str]], encoder: Tokenizer, length: int, summary: PackingSummary
) -> Iterator[_Row]:
    """Yield full rows, and count documents, tokens and the remainder in `summary`."""
    row = _Row()
    for url, text in documents:
        if not text.strip():
            summary.empty_documents += 1
            continue
        ids = [encoder.start_id, *encoder.encode(text), encoder.end_id]
        summary.documents += 1
        summary.characters += len(text)
        summary.tokens += len(ids)
        done = 0
        while done < len(ids):
            part = ids[done : done + length - len(row.ids)]
            row.documents.append({"url": url, "start": len(row.ids), "tokens": len(part)})
            row.ids += part
            done += len(part)
            if len(row.ids) == length:
                yield row
                row = _Row()
    summary.tail_tokens = len(row.ids)


def _chunks(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    part: list[_Row] = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _write_shard(
    base: str, shard: int, rows: list[_Row], dtype: np.dtype, summary: PackingSummary, per_shard: int
) -> None:
    digits = len(str(per_shard - 1))
    with TarWriter(f"{base}.tar") as tar:
        for index, row in enumerate(rows):
            content = io.BytesIO()
            np.save(content, np.array(row.ids, dtype=dtype), allow_pickle=False)
            documents = json.dumps({"documents": row.documents}).encode()
            tar.write(f"{shard:05d}{index:0{digits}d}", {"npy": content.getvalue(), "json": documents})
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "tokens": len(rows) * summary.length,
        "length": summary.length,
        "dtype": summary.dtype,
        "tokenizer": summary.tokenizer,
        "vocabulary": summary.vocabulary,
    }
    storage.publish(f"{base}_stats.json", json.dumps(stats, indent=4).encode())
