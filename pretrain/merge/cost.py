"""What a plan reads, writes and needs, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.merge.kernels import BLOCK
from pretrain.merge.plan import Plan, TensorJob
from pretrain.merge.safetensors_io import DTYPES, elements
from pretrain.merge.sources import WeightSource

RATE = 1e9
"""bytes a second, read and written together, that an estimate takes for granted"""
START = 90e6
"""bytes of an interpreter with numpy"""
PASSES = {"slerp": 2, "ties": 4}
"""times that a method looks at its inputs; the later ones mostly find them in the page cache"""


@dataclass(frozen=True)
class Cost:
    """Bytes read from the inputs (each once), bytes written, peak memory in bytes, seconds where RATE is had."""

    read: int
    written: int
    memory: int
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"reads {self.read:,} bytes, writes {self.written:,}; takes about {self.memory / 1e6:.0f} MB of memory, "
            f"and {self.seconds:.1f} s where disks give {RATE / 1e9:g} GB/s in all"
        ]


def cost(plan: Plan, sources: Sequence[WeightSource], threads: int = 4) -> Cost:
    """Nothing is read for it. Memory is that of arrays and interpreter, without the page cache of mapped files."""
    reads = {job.name: _read(job, sources) for job in plan.jobs}
    again = sum((PASSES.get(job.method, 1) - 1) * reads[job.name] for job in plan.jobs)
    terms = max((len(job.terms) for job in plan.jobs), default=1)
    headers = sum(len(file.header) for file in plan.files)
    memory = START + threads * BLOCK * 8 * (terms + 6) + 20 * headers
    total = sum(reads.values())
    return Cost(total, plan.size, int(memory), (total + again / 4 + plan.size) / RATE)


def _read(job: TensorJob, sources: Sequence[WeightSource]) -> int:
    terms = [*job.terms, *([job.base] if job.base is not None else [])]
    infos = {(term.source, term.name): sources[term.source].info(term.name) for term in terms}
    return sum(elements(shape) * DTYPES[dtype].itemsize for dtype, shape in infos.values())
