"""Opens and reads weights at many addresses under limits of memory and time, for test_merge_inputs.py.

Started as `python -m tests.fault.merge_reader ADDRESSES RESULTS`: a file with one address a line, and a file that gets
one JSON line for each: {"address", "error", "message", "tensors": {name: [dtype, shape, hex of the bytes]}}. What kills
the process leaves the lines of those before.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.weights.dtypes import elements
from pretrain.weights.source import open_weights

MEMORY = 1 << 30
SECONDS = 120


def attempt(address: str) -> dict[str, Any]:
    result: dict[str, Any] = {"address": address, "error": None, "message": "", "tensors": {}}
    try:
        source = open_weights(address)
        for name in source.names():
            dtype, shape = source.info(name)
            result["tensors"][name] = [dtype, shape, source.read(name, 0, elements(shape)).tobytes().hex()]
        _ = source.companions, source.lineage, source.hashes()
    except UserError as error:
        result |= {"error": "UserError", "message": str(error)}
    except BaseException as error:
        result |= {"error": type(error).__name__, "message": str(error)[:500]}
    return result


def peak() -> int:
    """KiB of the most memory held at once; getrusage would count what the parent had at the fork."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    addresses = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    with open(sys.argv[2], "w", encoding="utf-8") as out:
        for address in addresses:
            out.write(json.dumps(attempt(address)) + "\n")
            out.flush()
        out.write(json.dumps({"address": None, "peak_kib": peak()}) + "\n")


if __name__ == "__main__":
    main()
