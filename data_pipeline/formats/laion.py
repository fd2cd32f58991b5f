"""Parquet tables of image URLs and captions: LAION-400M, LAION-2B, Re-LAION, LAION-COCO, COYO, DataComp."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import ContentError, UserError
from data_pipeline.formats import parquet
from data_pipeline.formats.parquet import Column, match_columns, missing_columns, python_values, type_problems
from data_pipeline.formats.records import BadRecord
from data_pipeline.text_encoding import check_text

# Names in lower case: LAION's files have URL and TEXT, copies of them url and text. If a table has two
# similarities, ViT-L/14's is used, because the dataset was filtered with it.
COLUMNS = (
    Column("url", ("url", "image_url", "img_url"), "text", required=True),
    Column("caption", ("text", "caption", "alt", "alt_text"), "text", required=True),
    Column("top caption", ("top_caption",), "text"),
    Column("captions", ("all_captions",), "texts"),
    Column("caption scores", ("all_similarities",), "numbers"),
    Column("width", ("width", "original_width"), "number"),
    Column("height", ("height", "original_height"), "number"),
    Column(
        "similarity",
        (
            "similarity",
            "clip_l14_similarity_score",
            "clip_similarity_vitl14",
            "clip_b32_similarity_score",
            "clip_similarity_vitb32",
        ),
        "number",
    ),
    Column("punsafe", ("punsafe", "nsfw_score_opennsfw2", "nsfw_score_gantman"), "number"),
    Column("pwatermark", ("pwatermark", "watermark_score"), "number"),
    Column("aesthetic", ("aesthetic_score", "aesthetic", "aesthetic_score_laion_v2"), "number"),
    Column("nsfw", ("nsfw",), "any"),
    Column("license", ("license",), "text"),
    Column("language", ("language", "lang"), "text"),
    Column("hash", ("hash", "image_phash"), "any"),
    Column("md5", ("md5",), "text"),
    Column("id", ("uid", "sample_id", "key", "id"), "any"),
)
TITLES = {
    "laion-400m": "LAION-400M metadata",
    "laion-2b": "LAION-2B (Re-LAION) metadata, joined",
    "laion-2b-multi": "LAION-2B multilingual metadata, joined",
    "laion-2b-unjoined": "LAION-2B metadata, not joined with punsafe and pwatermark",
    "laion-coco": "LAION-COCO metadata",
    "coyo": "COYO-700M metadata",
    "datacomp": "DataComp metadata",
    "pairs": "image URLs and captions",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The URL of one image with its captions. Numbers are None if they are null, not finite, or a size below 1.

    captions: of LAION-COCO the generated captions, highest similarity first; of other sets the one caption, () if blank
    scores: the similarity of each caption, None if it is unknown
    alt_text: the alt text of the web page, if `captions` are generated
    nsfw: LAION-400M's label (UNLIKELY, UNSURE, NSFW)
    hash: LAION's int64 of URL and text, or COYO's perceptual hash in hexadecimal
    id: DataComp's uid or LAION-400M's SAMPLE_ID
    """

    url: str
    captions: tuple[str, ...]
    scores: tuple[float | None, ...] = ()
    alt_text: str | None = None
    width: int | None = None
    height: int | None = None
    similarity: float | None = None
    punsafe: float | None = None
    pwatermark: float | None = None
    aesthetic: float | None = None
    nsfw: str | None = None
    license: str | None = None
    language: str | None = None
    hash: int | str | None = None
    md5: str | None = None
    id: str | None = None


def identify(names: Sequence[str]) -> str | None:
    """The key in TITLES of a table with these columns; None if it has no image URL."""
    lower = {name.lower() for name in names}
    found = match_columns(names, COLUMNS)
    if "url" not in found:
        return None
    if lower & {"top_caption", "all_captions"}:
        return "laion-coco"
    if lower & {"clip_similarity_vitb32", "clip_similarity_vitl14"}:
        return "coyo"
    if "uid" in lower and lower & {
        "clip_l14_similarity_score",
        "clip_b32_similarity_score",
        "original_width",
    }:
        return "datacomp"
    if "text" not in lower:
        return "pairs"
    if "sample_id" in lower:
        return "laion-400m"
    if lower & {"punsafe", "pwatermark"}:
        return "laion-2b-multi" if "language" in lower else "laion-2b"
    if {"similarity", "nsfw"} <= lower:
        return "laion-2b-unjoined"
    return "pairs"


def missing_pair_columns(names: Sequence[str]) -> list[str]:
    """A sentence per required column that is missing. Generated captions replace the caption column."""
    columns: tuple[Column, ...] = COLUMNS
    if "top caption" in match_columns(names, COLUMNS):
        columns = tuple(column for column in COLUMNS if column.meaning != "caption")
    return missing_columns(names, columns)


def read_pairs(path: str, rows: int = 1024) -> Iterator[Pair | BadRecord]:
    """Yield every row of every parquet file of `path`, in order: a Pair, or a BadRecord.

    Reads `rows` rows at a time and only the columns of a Pair. Reasons of a BadRecord: `missing url`, `not UTF-8`,
    `NUL in text`. Raises UserError, with the file, if a required column is missing or has a wrong type, or if the file
    is damaged.
    """
    for file in parquet.list_files(path):
        with parquet.open_file(file) as source:
            yield from pairs_of(file, source, rows)


def pairs_of(file: str, source: Any, rows: int = 1024) -> Iterator[Pair | BadRecord]:
    """`read_pairs` of one open parquet file."""
    schema = source.schema_arrow
    problems = type_problems(schema, COLUMNS)
    fatal = missing_pair_columns(schema.names) + [problems[m] for m in ("url", "caption") if m in problems]
    if fatal:
        raise UserError(f"{file}: {fatal[0]}")
    found = {
        meaning: name
        for meaning, name in match_columns(schema.names, COLUMNS).items()
        if meaning not in problems
    }
    number = 0
    for batch in source.iter_batches(batch_size=rows, columns=list(dict.fromkeys(found.values()))):
        taken = {meaning: python_values(batch.column(name)) for meaning, name in found.items()}
        for row in zip(*taken.values(), strict=True):
            yield _pair(dict(zip(taken, row, strict=True)), file, number)
            number += 1


def _pair(row: Mapping[str, Any], file: str, number: int) -> Pair | BadRecord:
    place = f"row {number}"
    broken = next((meaning for meaning, value in row.items() if isinstance(value, bytes)), None)
    if broken is not None:
        return BadRecord(file, place, "not UTF-8", broken)
    url = (row["url"] or "").strip()
    if not url:
        return BadRecord(file, place, "missing url")
    try:
        own = _caption(row.get("caption"))
        captions, scores = _generated(row)
    except ContentError as error:
        return BadRecord(file, place, error.reason, error.detail)
    generated = "top caption" in row or "captions" in row
    if not generated:
        captions, scores = ((own,), (None,)) if own else ((), ())
    return Pair(
        url=url,
        captions=captions,
        scores=scores,
        alt_text=own if generated else None,
        width=_size(row.get("width")),
        height=_size(row.get("height")),
        similarity=_number(row.get("similarity")),
        punsafe=_number(row.get("punsafe")),
        pwatermark=_number(row.get("pwatermark")),
        aesthetic=_number(row.get("aesthetic")),
        nsfw=_label(row.get("nsfw")),
        license=_blank_to_none(row.get("license")),
        language=_blank_to_none(row.get("language")),
        hash=_hash(row.get("hash")),
        md5=_blank_to_none(row.get("md5")),
        id=_label(row.get("id")),
    )


def _generated(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float | None, ...]]:
    """(captions, scores) of LAION-COCO: the top caption, then the others, highest similarity first; no duplicates."""
    texts = row.get("captions") or []
    numbers = [_number(score) for score in row.get("caption scores") or []]
    if len(numbers) != len(texts):
        numbers = [None] * len(texts)
    scored: dict[str, float | None] = {}
    ranked = sorted(
        zip(texts, numbers, strict=True), key=lambda pair: math.inf if pair[1] is None else -pair[1]
    )
    top = _caption(row.get("top caption"))
    if top is not None:
        scored[top] = next((score for text, score in ranked if (text or "").strip() == top), None)
    for text, score in ranked:
        kept = _caption(text)
        if kept is not None:
            scored.setdefault(kept, score)
    return tuple(scored), tuple(scored.values())


def _blank_to_none(text: str | None) -> str | None:
    return (text or "").strip() or None


def _caption(text: str | None) -> str | None:
    """The stripped caption, None if it is blank. Raises ContentError `NUL in text`."""
    return check_text(text or "").strip() or None


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _size(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number >= 1 else None


def _label(value: Any) -> str | None:
    """Ids and labels as text. A float id (from a copy with float columns) is written as an integer."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _hash(value: Any) -> int | str | None:
    if isinstance(value, float):
        return int(value) if math.isfinite(value) else None
    return value if isinstance(value, (int, str)) else None
