"""Cost of the sample order: refs and byte ranges of a step over as many shards as LAION-2B has.

The bars come from the design. Every figure is measured in its own process, in CPU time of one thread.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BATCH, SHARDS, TEMPLATES = 65_536, 232_000, 64
STEPS = 40
SOURCES = 120


def run(rounds: int) -> dict[str, Any]:
    """Milliseconds, megabytes and ratios; the slowest of `rounds` processes counts."""
    with tempfile.TemporaryDirectory() as folder:
        write_offsets(Path(folder))
        found = [measure(folder) for _ in range(rounds)]
    rows = {name: max(one[name] for one in found) for name in found[0]}
    rows |= {f"topic variance over i.i.d., {shards:,} shards": variance(shards) for shards in VARIANCES}
    what = (
        f"refs and byte ranges of a batch of {BATCH:,} over {SHARDS:,} uneven shards; slowest of the rounds"
    )
    return {"what": what, "unit": "ms, MB or ratio", "rows": rows, "most": MOST}


VARIANCES = {232_000: 6.0, 399: 2.0, 150: 2.0, 40: 2.0, 7: 2.0}
MOST = {
    "whole batch, median of steps (ms)": 50,
    "whole batch, slowest step (ms)": 100,
    "whole batch, first in the process (ms)": 100,
    "whole batch, first of an epoch (ms)": 100,
    "an eighth of it, median (ms)": 8,
    f"{SOURCES} sources, refs of a batch, median (ms)": 50,
    "anonymous memory above imports (MB)": 64,
} | {f"topic variance over i.i.d., {shards:,} shards": most for shards, most in VARIANCES.items()}


def write_offsets(folder: Path) -> None:
    """An offset file of 2.3e9 samples, 4.6 GB, assembled from the blocks of a few shards."""
    from data_pipeline.sources.offset_file import check_of, pack_starts

    random = np.random.RandomState(0)
    counts = random.randint(8_000, 12_001, TEMPLATES)
    blocks, checks = [], []
    for count in counts:
        sizes = 512 * random.randint(4, 500, count)
        block, width = pack_starts(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        assert width == 2
        blocks.append(block)
        checks.append(check_of(block, int(count)))
    which = random.randint(0, TEMPLATES, SHARDS)
    with open(folder / "offsets.bin", "wb") as file:
        for number in which:
            file.write(blocks[number])
        file.flush()
        os.fsync(file.fileno())  # dirty pages are slower to map
    lengths = np.array([len(block) for block in blocks])[which]
    np.savez(
        folder / "shards.npz",
        counts=counts[which],
        blocks=np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        checks=np.array(checks, np.uint64)[which],
    )


def measure(folder: str) -> dict[str, float]:
    """The figures of one fresh process, with the offset file in the page cache."""
    with open(Path(folder) / "offsets.bin", "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.order", folder], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def anonymous() -> float:
    """Anonymous memory of this process in megabytes."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def milliseconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def child(folder: str) -> dict[str, float]:
    """Figures of one process, from opening the source to computing a step."""
    from data_pipeline.order.stream_order import SourceCounts, StreamOrder
    from data_pipeline.sources.manifest import Manifest
    from data_pipeline.sources.offset_file import OffsetFile
    from data_pipeline.sources.offsets import Offsets

    np.zeros(1).sum()
    before = anonymous()
    with np.load(Path(folder) / "shards.npz") as shards:
        counts, blocks, checks = (shards[key] for key in ("counts", "blocks", "checks"))
    file = OffsetFile(str(Path(folder) / "offsets.bin"), blocks, np.full(SHARDS, 2, np.uint8), checks)
    paths = [f"{number:06d}.tar" for number in range(SHARDS)]
    manifest = Manifest("laion", folder, paths, counts, counts * 130_000, "manifest", "", offsets=file)
    order = StreamOrder([SourceCounts("laion", manifest.counts)], BATCH, None, seed=1)
    offsets = Offsets(manifest)
    most = anonymous()

    def step(number: int, start: int = 0, stop: int = BATCH) -> float:
        nonlocal most

        def call() -> None:
            refs = order.refs(number, start, stop)
            offsets.ranges(refs.shard, manifest.tar_positions(refs.shard, refs.index))

        taken = milliseconds(call)
        most = max(most, anonymous())  # outside the timed part, because it walks the pages of the offset file
        return taken

    epoch = order.samples_per_epoch() // BATCH
    cold = step(0)
    edges = [step(number) for number in (epoch, 2 * epoch, 7 * epoch)]
    wide = [step(number) for number in np.linspace(1, 3 * epoch, STEPS, dtype=int).tolist()]
    eighth = [step(number, 3 * BATCH // 8, 4 * BATCH // 8) for number in range(5, 5 + STEPS)]
    random = np.random.RandomState(1)
    sizes = [random.randint(8_000, 12_001, 10 + number * 8) for number in range(SOURCES)]
    mixture = StreamOrder([SourceCounts(f"s{k}", one) for k, one in enumerate(sizes)], BATCH, None, seed=1)
    mixed = [milliseconds(partial(mixture.refs, number)) for number in range(0, 100 * STEPS, 100)]
    return {
        "whole batch, median of steps (ms)": float(np.median(wide)),
        "whole batch, slowest step (ms)": max(wide),
        "whole batch, first in the process (ms)": cold,
        "whole batch, first of an epoch (ms)": max(edges),
        "an eighth of it, median (ms)": float(np.median(eighth)),
        f"{SOURCES} sources, refs of a batch, median (ms)": float(np.median(mixed)),
        "anonymous memory above imports (MB)": most - before,
    }


def variance(shards: int) -> float:
    """Variance of a topic's rows per batch if each shard has its own topic, divided by that of independent draws."""
    from data_pipeline.order.stream_order import SourceCounts, StreamOrder

    order = StreamOrder([SourceCounts("a", np.full(shards, 10_000))], BATCH, None, seed=1)
    steps = np.linspace(0, 3 * order.samples_per_epoch() / BATCH, 12, dtype=int)
    rows = np.stack([np.bincount(order.refs(int(step)).shard, minlength=shards) for step in steps])
    mean = BATCH / shards
    return float(((rows - mean) ** 2).mean() / (mean * (1 - 1 / shards)))


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))
