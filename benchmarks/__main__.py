"""`make bench`: runs the benchmarks, prints a table each, writes the numbers as JSON where --out says."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from benchmarks import index, loader, merge, order, peers

BENCHMARKS = {"index": index.run, "loader": loader.run, "merge": merge.run, "order": order.run}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def main() -> None:
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
        "--peers", type=_words, default=tuple(peers.PEERS), help="loader: beside whom; default: all"
    )
    parser.add_argument("--no-memory", action="store_true", help="loader: leave out 50,000 samples of memory")
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
    arguments = parser.parse_args()
    if wrong := set(arguments.parts) - set(merge.PARTS):
        parser.error(f"no part {min(wrong)!r}; there are {', '.join(merge.PARTS)}")
    if strange := set(arguments.peers) - set(peers.PEERS):
        parser.error(f"no peer {min(strange)!r}; there are {', '.join(peers.PEERS)}")
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    machine = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    print(
        f"{machine['cores']} cores, Python {machine['python']}; best of {arguments.rounds} rounds, taken in turn"
    )
    own = {
        "loader": {
            "data": arguments.data,
            "workers": arguments.workers,
            "beside": arguments.peers,
            "memory": not arguments.no_memory,
        },
        "merge": {"parts": arguments.parts, "folder": arguments.folder},
    }
    figures = {}
    for name in arguments.names or BENCHMARKS:
        figures[name] = BENCHMARKS[name](arguments.rounds, **own.get(name, {}))
        print(f"\n{name}: {figures[name]['what']}")
        most, least = (figures[name].get(kind, {}) for kind in ("most", "least"))
        for row, value in figures[name]["rows"].items():
            shown, verdict = (
                f"{value:,.{2 if value < 100 and name == 'merge' else 0}f} {figures[name]['unit']}",
                "",
            )
            if row in most:
                shown, verdict = f"{value:,.1f}", _verdict(most[row], value < most[row])
            elif row in least:
                shown, verdict = f"{value:,.2f}", _verdict(least[row], value >= least[row])
            print(f"  {row:<44} {shown:>20}{verdict}")
        for line in figures[name].get("notes", []):
            print(f"  {line}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n")


def _verdict(bar: float, held: bool) -> str:
    return f"   bar {bar:g}{'' if held else ': NOT HELD'}"


if __name__ == "__main__":
    main()
