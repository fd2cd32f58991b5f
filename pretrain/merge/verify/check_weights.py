"""Checks one weight file against the digests and sizes in merge.json, and counts NaN and infinities.

`Report` collects the findings of all checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from pretrain.merge.methods.blocks import Workers
from pretrain.merge.verify.recompute import Progress
from pretrain.weights.digests import file_digest, tensor_digest
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK, elements
from pretrain.weights.folder import Folder
from pretrain.weights.formats.safetensors_file import SafetensorsFile

# dtype -> unsigned integer type of the same size, mask of all bits but the sign, bits of infinity; larger ones are NaN.
INFINITY = {
    "F64": ("<u8", (1 << 63) - 1, 0x7FF << 52), "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F16": ("<u2", 0x7FFF, 0x7C00), "BF16": ("<u2", 0x7FFF, 0x7F80),
}  # fmt: skip
Level = Literal["wrong", "note", "good"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. Only the level "wrong" makes the report wrong; "note" is for information."""

    level: Level
    text: str


@dataclass
class Report:
    """The findings of `verify`.

    not_finite: name -> (NaNs, infinities) of the tensors that have any.
    inputs:     (address, state) of each input; states: unchanged, changed, gone, not reached.
    recomputed: number of chunks that were recomputed from the inputs.
    """

    folder: str
    findings: list[Finding] = field(default_factory=list)
    not_finite: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: list[tuple[str, str]] = field(default_factory=list)
    recomputed: int = 0

    @property
    def wrong(self) -> bool:
        return any(finding.level == "wrong" for finding in self.findings)

    def add(self, level: Level, text: str) -> None:
        self.findings.append(Finding(level, text))

    def plain(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "folder": self.folder,
            "wrong": self.wrong,
            "findings": [{"level": f.level, "text": f.text} for f in self.findings],
            "not_finite": {n: {"nan": nan, "inf": inf} for n, (nan, inf) in self.not_finite.items()},
            "inputs": [{"address": address, "state": state} for address, state in self.inputs],
            "recomputed": self.recomputed,
        }

    def lines(self) -> list[str]:
        """The report for the terminal, the level "wrong" first."""
        marks = {"wrong": "WRONG  ", "note": "note   ", "good": "ok     "}
        order = ("wrong", "note", "good")
        listed = sorted(self.findings, key=lambda finding: order.index(finding.level))
        verdict = "something is wrong" if self.wrong else "nothing is wrong"
        return [*(marks[f.level] + f.text for f in listed), f"{self.folder}: {verdict}"]


def open_file(report: Report, folder: Folder, name: str, entry: Mapping[str, Any]) -> SafetensorsFile | None:
    """Open a weight file of the output; None, with a finding in the report, if it is missing or has no valid header."""
    if name not in folder:
        report.add("wrong", f"{name}: missing")
        return None
    try:
        file = folder.open(name)
        if file.size != entry["size"]:
            report.add("wrong", f"{name}: {file.size:,} bytes, but the merge wrote {entry['size']:,}")
        return SafetensorsFile(file)
    except UserError as error:
        report.add("wrong", str(error))
        return None


def check_file(
    report: Report,
    name: str,
    file: SafetensorsFile,
    entry: Mapping[str, Any],
    record: Mapping[str, Any],
    workers: Workers,
    progress: Progress | None,
) -> bool:
    """Read the file once: compare its digests with merge.json, count NaN and infinities. True if the file is intact."""
    digests = {}
    for tensor in file.names():
        digests[tensor], *counts = _scan_tensor(file, tensor, workers)
        if any(counts):
            report.not_finite[tensor] = counts[0], counts[1]
        if progress is not None:
            progress(elements(file.info(tensor)[1]) * file.read(tensor, 0, 0).itemsize)
    if file_digest(file.header, digests.values()) == entry["digest"]:
        return True
    changed = [tensor for tensor, digest in digests.items() if record["tensors"].get(tensor) != digest]
    for tensor in changed:
        reason = "changed since it was written" if tensor in record["tensors"] else "not part of this merge"
        report.add("wrong", f"{name}: {tensor}: {reason}")
    if not changed:
        report.add("wrong", f"{name}: its header has changed, or a tensor is missing")
    return False


def _scan_tensor(file: SafetensorsFile, tensor: str, workers: Workers) -> tuple[str, int, int]:
    """The digest of a tensor and its numbers of NaNs and infinities, in one pass."""
    dtype, shape = file.info(tensor)

    def work(start: int, stop: int) -> tuple[bytes, int, int]:
        digest, nan, inf = xxhash.xxh64(), 0, 0
        for first in range(start, stop, ELEMENTS_PER_BLOCK):
            block = file.read(tensor, first, min(first + ELEMENTS_PER_BLOCK, stop))
            digest.update(block.view(np.uint8).data)
            if dtype in INFINITY:
                integer, mask, infinity = INFINITY[dtype]
                bits = block.view(integer) & np.dtype(integer).type(mask)
                nan += int(np.count_nonzero(bits > infinity))
                inf += int(np.count_nonzero(bits == infinity))
        return digest.digest(), nan, inf

    parts = list(workers.map_spans(work, elements(shape)))
    return (
        tensor_digest(part[0] for part in parts),
        sum(part[1] for part in parts),
        sum(part[2] for part in parts),
    )
