"""`make bench`: runs the benchmarks, prints a table each, writes the numbers as JSON where --out says."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from benchmarks import loading, merging

BENCHMARKS = {"loading": loading.run, "merging": merging.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each, best one counts (default 3)")
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    print(
        f"{machine['cores']} cores, Python {machine['python']}; best of {arguments.rounds} rounds, taken in turn"
    )
    figures = {}
    for name in arguments.names or BENCHMARKS:
        figures[name] = BENCHMARKS[name](arguments.rounds)
        print(f"\n{name}: {figures[name]['what']}")
        for row, value in figures[name]["rows"].items():
            print(f"  {row:<44} {value:>10,.0f} {figures[name]['unit']}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
