"""One file of weights of a merge's output: whether it is as it was written, and what in it is not finite."""

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

# dtype -> unsigned integers of its size, bits without the sign, and those of infinity; above them is NaN
INFINITY = {
    "F64": ("<u8", (1 << 63) - 1, 0x7FF << 52), "F32": ("<u4", 0x7FFFFFFF, 0x7F800000),
    "F16": ("<u2", 0x7FFF, 0x7C00), "BF16": ("<u2", 0x7FFF, 0x7F80),
}  # fmt: skip
Level = Literal["wrong", "note", "good"]


def open_file(report: Report, folder: Folder, name: str, entry: Mapping[str, Any]) -> SafetensorsFile | None:
    """The file by its header; None, with the reason in the report, where it is none."""
    if name not in folder:
        report.add("wrong", f"{name}: not there")
        return None
    try:
        file = folder.open(name)
        if file.size != entry["size"]:
            report.add("wrong", f"{name}: {file.size:,} bytes, written were {entry['size']:,}")
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
    """Digests of every tensor and of the whole; NaN and infinities on the way."""
    found = {}
    for tensor in file.names():
        found[tensor], *counts = _look_at(file, tensor, workers)
        if any(counts):
            report.not_finite[tensor] = counts[0], counts[1]
        if progress is not None:
            progress(elements(file.info(tensor)[1]) * file.read(tensor, 0, 0).itemsize)
    if file_digest(file.header, found.values()) == entry["digest"]:
        return True
    other = [tensor for tensor, digest in found.items() if record["tensors"].get(tensor) != digest]
    for tensor in other:
        known = "other bytes than were written" if tensor in record["tensors"] else "not of this merge"
        report.add("wrong", f"{name}: {tensor}: {known}")
    if not other:
        report.add("wrong", f"{name}: another header than was written, or a tensor is missing")
    return False


def _look_at(file: SafetensorsFile, tensor: str, workers: Workers) -> tuple[str, int, int]:
    """Digest, NaNs and infinities of a tensor, in one reading."""
    dtype, shape = file.info(tensor)

    def work(start: int, stop: int) -> tuple[bytes, int, int]:
        digest, nan, inf = xxhash.xxh64(), 0, 0
        for at in range(start, stop, ELEMENTS_PER_BLOCK):
            block = file.read(tensor, at, min(at + ELEMENTS_PER_BLOCK, stop))
            digest.update(block.view(np.uint8).data)
            if dtype in INFINITY:
                kind, magnitude, infinite = INFINITY[dtype]
                bits = block.view(kind) & np.dtype(kind).type(magnitude)
                nan += int(np.count_nonzero(bits > infinite))
                inf += int(np.count_nonzero(bits == infinite))
        return digest.digest(), nan, inf

    parts = list(workers.over(work, elements(shape)))
    return (
        tensor_digest(part[0] for part in parts),
        sum(part[1] for part in parts),
        sum(part[2] for part in parts),
    )


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `wrong` decides; `note` is worth knowing."""

    level: Level
    text: str


@dataclass
class Report:
    """What `verify` found.

    not_finite: name -> (NaNs, infinities) of tensors that have any.
    inputs:     (address, unchanged | changed | gone | not reached).
    recomputed: chunks that were computed again.
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
        """As JSON holds it."""
        return {
            "folder": self.folder,
            "wrong": self.wrong,
            "findings": [{"level": f.level, "text": f.text} for f in self.findings],
            "not_finite": {n: {"nan": nan, "inf": inf} for n, (nan, inf) in self.not_finite.items()},
            "inputs": [{"address": address, "state": state} for address, state in self.inputs],
            "recomputed": self.recomputed,
        }

    def lines(self) -> list[str]:
        """For people: what is wrong first."""
        marks = {"wrong": "WRONG  ", "note": "note   ", "good": "ok     "}
        order = ("wrong", "note", "good")
        listed = sorted(self.findings, key=lambda finding: order.index(finding.level))
        verdict = "something is wrong" if self.wrong else "nothing is wrong"
        return [*(marks[f.level] + f.text for f in listed), f"{self.folder}: {verdict}"]
