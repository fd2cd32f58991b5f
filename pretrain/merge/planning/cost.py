"""What a plan reads, writes and needs, from sizes alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.merge.merge_plan import Plan, TensorJob
from pretrain.weights.dtypes import BLOCK, DTYPES, elements
from pretrain.weights.source import WeightSource

RATE = 1e9
"""bytes a second, read, combined and written, that an estimate takes for granted"""
START = 32e6
"""bytes of the command with numpy before it merges, as measured"""
SPANNED = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
WORK = {**dict.fromkeys(SPANNED, 2), "ties": 3, "breadcrumbs": 4, "breadcrumbs_ties": 4, "sce": 6}
"""how often a method goes over what it reads, where that is more than once"""


@dataclass(frozen=True)
class Cost:
    """Bytes read from the inputs (each once), bytes written, peak memory in bytes, seconds where RATE is had."""

    read: int
    written: int
    memory: int
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        time = f"{self.seconds:.1f} s" if self.seconds >= 0.1 else "less than 0.1 s"
        return [
            f"reads {self.read:,} bytes, writes {self.written:,}; takes about {self.memory / 1e6:.0f} MB of memory, "
            f"and {time} where the machine moves {RATE / 1e9:g} GB/s"
        ]


def cost(plan: Plan, sources: Sequence[WeightSource], threads: int | None = None) -> Cost:
    """Nothing is read for it. Memory is that of arrays and interpreter, without the page cache of mapped files."""
    reads = {job.name: _read(job, sources) for job in plan.jobs}
    work = sum(WORK.get(job.method, 1) * reads[job.name] for job in plan.jobs)
    arrays = max((len(job.terms) + (16 if job.method == "ties" else 6) for job in plan.jobs), default=0)
    headers = sum(len(file.header) for file in plan.files)
    memory = START + (threads or processors()) * BLOCK * 8 * arrays + 20 * headers
    return Cost(sum(reads.values()), plan.size, int(memory), (work + plan.size) / RATE)


def processors() -> int:
    """Threads of a merge: as pretrain.merge.methods.blocks takes them."""
    return min(4, len(os.sched_getaffinity(0)))


def _read(job: TensorJob, sources: Sequence[WeightSource]) -> int:
    terms = [*job.terms, *([job.base] if job.base is not None else [])]
    infos = {(term.source, term.name): sources[term.source].info(term.name) for term in terms}
    return sum(elements(shape) * DTYPES[dtype].itemsize for dtype, shape in infos.values())
