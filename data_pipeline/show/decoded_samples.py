"""Decodes samples of tars as training does, and reports those that training would replace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from data_pipeline import storage
from data_pipeline.errors import ContentError, UserError
from data_pipeline.formats.records import BadRecord
from data_pipeline.show.members import read_members
from data_pipeline.show.source_report import (
    BadRecordCounts,
    DecodedSamples,
    SourceReport,
    format_share,
    shorten,
)
from data_pipeline.sources.sample_check import SAMPLES_AT_START, image_bytes, read_sample
from data_pipeline.sources.tar import Sample
from data_pipeline.transforms.captions import pick_caption
from data_pipeline.transforms.decode import ImageSpec, decode_image, upright_size
from data_pipeline.transforms.text_formats import PackedFormat, read_npy

# Samples decoded in all examined tars together; each sample of a remote tar is a request of its own.
DECODED_SAMPLES, DECODED_REMOTE_SAMPLES = 240, 64
DECODED_BYTES = 64 << 20  # of samples; fewer are decoded where they are large, so that it takes seconds
NO_DECODER = "no image was decoded, because Pillow is not installed: pip install 'dromos[train]'"
Place = tuple[str, Sample]


def judge_samples(report: SourceReport, tables: Mapping[str, Sequence[Sample]]) -> None:
    """Decode the first samples and others, evenly spaced over the tars, into `report.decoded`.

    `tables` maps a tar to its samples. Images are decoded and captions chosen by the functions of training.
    """
    decoded = report.decoded = DecodedSamples()
    has_decoder = _has_pillow()
    if not has_decoder:
        report.notes.append(NO_DECODER)
    for url, sample in _chosen(tables):
        decoded.examined += 1
        try:
            _judge(decoded, url, sample, has_decoder)
        except ContentError as error:
            decoded.bad.append(BadRecord(url, sample.key, error.reason, error.detail))
    _report_bad(report, decoded)


def judge_packed(report: SourceReport, tables: Mapping[str, Sequence[Sample]]) -> None:
    """Read samples of packed text as training does; all must be as long as the first one."""
    decoded = report.decoded = DecodedSamples()
    length = 0
    for url, sample in _chosen(tables):
        decoded.examined += 1
        members = read_members(url, sample)
        try:
            length = length or _length(members)
            read_sample(members, None, partial(PackedFormat(length).row, tokenizer=None, draw=None))
        except ContentError as error:
            decoded.bad.append(BadRecord(url, sample.key, error.reason, error.detail))
        except UserError as error:
            report.problems.append(
                f"{url}, sample {shorten(sample.key)}: {error}; other samples have {length}"
            )
            return
    _report_bad(report, decoded)


def _has_pillow() -> bool:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        return False
    return True


def _chosen(tables: Mapping[str, Sequence[Sample]]) -> Iterator[Place]:
    """The first samples, which the start of a run reads too, and others, evenly spaced."""
    places = [(url, sample) for url, table in tables.items() for sample in table]
    if not places:
        return
    sizes = sum(length for _, sample in places for _, length in sample.members.values())
    limit = DECODED_REMOTE_SAMPLES if storage.is_remote(places[0][0]) else DECODED_SAMPLES
    affordable = int(DECODED_BYTES * len(places) / max(sizes, 1))
    spread = max(min(limit, affordable) - SAMPLES_AT_START, 1)
    numbers = set(range(min(SAMPLES_AT_START, len(places))))
    numbers |= {i * len(places) // spread for i in range(spread)}
    yield from (places[number] for number in sorted(numbers))


def _judge(decoded: DecodedSamples, url: str, sample: Sample, has_decoder: bool) -> None:
    """Decode and measure one sample. Raises ContentError if it is unusable."""
    members = read_members(url, sample)

    def decode(data: bytes) -> tuple[int, int] | None:
        if not has_decoder:
            return None
        decode_image(data, spec, None, np.empty((spec.size, spec.size, 3), np.uint8))
        decoded.pictured.append((url, sample))
        return upright_size(data)

    spec, measured = ImageSpec(), decoded.measurements
    size, text = read_sample(members, decode, lambda given: pick_caption(given, None)[0])
    assert text is not None
    measured.captions.append(text)
    measured.words.append(len(text.split()))
    measured.bytes.append(len(image_bytes(members)))
    if size is not None:
        measured.width.append(size[0])
        measured.height.append(size[1])


def _length(members: Mapping[str, bytes]) -> int:
    """Tokens of a packed sample, at least 1; 0 if they cannot be read."""
    try:
        return max(read_npy(members.get("npy", b"")).size, 1)
    except ValueError:
        return 0


def _report_bad(report: SourceReport, decoded: DecodedSamples) -> None:
    if not decoded.bad:
        return
    bad = BadRecordCounts()
    for record in decoded.bad:
        bad.add(record)
    listed = ", ".join(f"{reason} {count:,}" for reason, count in bad.counts.most_common())
    first = decoded.bad[0]
    effect = (
        "Training replaces such samples"
        if len(decoded.bad) < decoded.examined
        else "Training on this source would stop"
    )
    report.problems.append(
        f"{format_share(len(decoded.bad), decoded.examined)} samples decoded are unusable: {listed}; the first is "
        f"{shorten(first.place)} in {first.where}. {effect}; write them again or leave them out"
    )
    report.about["verdicts"] = dict(bad.counts.most_common())
    report.about["bad"] = bad.examples
