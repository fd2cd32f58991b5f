"""Documents to packed text: tokenised, joined end to end, cut in rows of one length, written as tars."""

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
class Packed:
    """What packing made of the documents: tokens = rows x length + tail_tokens."""

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
    """A row being filled, and which part of which document went into it."""

    ids: list[int] = field(default_factory=list)
    documents: list[dict[str, Any]] = field(default_factory=list)


def pack(source: str, out: str, tokenizer: str, length: int, rows_per_shard: int = ROWS_PER_SHARD) -> Packed:
    """Pack the RefinedWeb parquet files of `source` into tars in `out`; returns and writes the sums.

    A document becomes start + ids + end; documents follow each other in the files' order. A sample of the
    tars is KEY.npy, uint16 or uint32 `[length]`, and KEY.json, {"documents": [{url, start, tokens}]}. The
    last tokens, fewer than `length`, make no row and are counted as tail_tokens in packed.json, which is
    written last. Beside each tar stands a `_stats.json` that holds its count and the fingerprint of the
    tokenizer. Raises UserError if `out` holds tars already or not one row comes of it.
    """
    encoder = load_tokenizer(tokenizer)
    _refuse_used(out)
    if length < 2:
        raise UserError(f"packed rows need a length of at least 2 tokens, not {length}")
    dtype = np.dtype("<u2") if encoder.vocab_size <= 1 << 16 else np.dtype("<u4")
    sums = Packed(length, encoder.fingerprint, encoder.vocab_size, dtype.name)
    rows = _rows(refinedweb.documents(source), encoder, length, sums)
    for shard, part in enumerate(_chunks(rows, rows_per_shard)):
        _write_shard(storage.join(out, f"{shard:05d}"), shard, part, dtype, sums, rows_per_shard)
        sums.shards += 1
        sums.rows += len(part)
    if not sums.rows:
        raise UserError(
            f"{source} holds {sums.tokens} tokens, fewer than one row of {length}; give more text"
        )
    storage.publish(storage.join(out, SUMMARY), json.dumps(asdict(sums), indent=2).encode())
    return sums


def _refuse_used(out: str) -> None:
    """Shards of an earlier packing would stay among the new ones and be trained on."""
    try:
        there = storage.list_shards(out)
    except UserError:
        return
    raise UserError(f"{out} holds {len(there)} tars already; remove them or name another folder")


def _rows(
    documents: Iterable[tuple[str, str]], encoder: Tokenizer, length: int, sums: Packed
) -> Iterator[_Row]:
    """Full rows; what is left over is counted in `sums`."""
    row = _Row()
    for url, text in documents:
        if not text.strip():
            sums.empty_documents += 1
            continue
        ids = [encoder.start_id, *encoder.encode(text), encoder.end_id]
        sums.documents += 1
        sums.characters += len(text)
        sums.tokens += len(ids)
        done = 0
        while done < len(ids):
            part = ids[done : done + length - len(row.ids)]
            row.documents.append({"url": url, "start": len(row.ids), "tokens": len(part)})
            row.ids += part
            done += len(part)
            if len(row.ids) == length:
                yield row
                row = _Row()
    sums.tail_tokens = len(row.ids)


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
    base: str, shard: int, rows: list[_Row], dtype: np.dtype, sums: Packed, per_shard: int
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
        "tokens": len(rows) * sums.length,
        "length": sums.length,
        "dtype": sums.dtype,
        "tokenizer": sums.tokenizer,
        "vocabulary": sums.vocabulary,
    }
    storage.publish(f"{base}_stats.json", json.dumps(stats, indent=4).encode())
