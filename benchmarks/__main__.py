"""`make bench`: runs benchmarks and prints one table per benchmark; `--out FILE` writes the numbers as JSON.

Exit code 1 if a row misses its bar, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks import index, loader, merge, order, peers, startup

BENCHMARKS = {
    "index": index.run,
    "loader": loader.run,
    "merge": merge.run,
    "order": order.run,
    "startup": startup.run,
}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks, or all; 1 if a bar is not held."""
    options = parse(arguments)
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    print(
        f"{machine['cores']} cores, Python {machine['python']}; best of {options.rounds} rounds, taken in turn"
    )
    settings: dict[str, dict[str, Any]] = {
        "loader": {
            "data": options.data,
            "workers": options.workers,
            "beside": options.peers,
            "memory": not options.no_memory,
        },
        "merge": {"parts": options.parts, "folder": options.folder},
    }
    figures, missed = {}, []
    for name in options.names or BENCHMARKS:
        figures[name] = BENCHMARKS[name](options.rounds, **settings.get(name, {}))
        print("\n".join(table(name, figures[name])), flush=True)
        missed += [f"{name}: {row}" for row in missed_bars(figures[name])]
    if options.out:
        options.out.write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n")
    for bar in missed:
        print(f"bar not held: {bar}", file=sys.stderr)
    return 1 if missed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each, best one counts (default 3)")
    parser.add_argument(
        "--data", type=Path, help="loader: folder of tars with photographs (default: it makes some)"
    )
    parser.add_argument(
        "--workers", type=_numbers, default=(1, 2), help="loader: worker processes (default 1,2)"
    )
    parser.add_argument(
        "--peers", type=_words, default=tuple(peers.PEERS), help="loader: beside which peers; default: all"
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="loader: leave out the memory figure of 50,000 samples"
    )
    parser.add_argument(
        "--parts",
        type=_words,
        default=merge.PARTS,
        help=f"merge: which of {','.join(merge.PARTS)}; default: all",
    )
    parser.add_argument(
        "--folder", type=Path, help="merge: where to put 25 GB (default: the temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    options = parser.parse_args(arguments)
    if wrong := set(options.parts) - set(merge.PARTS):
        parser.error(f"no part {min(wrong)!r}; there are {', '.join(merge.PARTS)}")
    if strange := set(options.peers) - set(peers.PEERS):
        parser.error(f"no peer {min(strange)!r}; there are {', '.join(peers.PEERS)}")
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    return options


def table(name: str, figures: dict[str, Any]) -> list[str]:
    """Lines that show the figures of a benchmark, each with its bar."""
    most, least, missed = figures.get("most", {}), figures.get("least", {}), missed_bars(figures)
    lines = [f"\n{name}: {figures['what']}"]
    for row, value in figures["rows"].items():
        bar = most.get(row, least.get(row))
        if bar is not None:
            digits = 1 if row in most and bar >= 10 else 2
            shown, verdict = (
                f"{value:,.{digits}f}",
                f"   bar {bar:g}{': NOT HELD' if row in missed else ''}",
            )
        else:
            digits = 2 if value < 100 and name in ("merge", "startup") else 0
            shown, verdict = f"{value:,.{digits}f} {figures['unit']}", ""
        lines.append(f"  {row:<56} {shown:>20}{verdict}")
    return [*lines, *(f"  {line}" for line in figures.get("notes", []))]


def missed_bars(figures: dict[str, Any]) -> list[str]:
    """Rows that miss their bar: a value must be below its `most` and at least its `least`."""
    rows = figures["rows"]
    return [
        *(row for row, bar in figures.get("most", {}).items() if row in rows and not rows[row] < bar),
        *(row for row, bar in figures.get("least", {}).items() if row in rows and not rows[row] >= bar),
    ]


if __name__ == "__main__":
    sys.exit(main())
