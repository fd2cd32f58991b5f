"""`make demo`: data, FLIP, SPHINX, a merge and a sweep, then summary.json and the report. Skips finished parts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.errors import UserError
from pretrain.run.exit_codes import DONE, RUN_AGAIN, USER_ERROR

FLIP, SPHINX = "configs/demo/flip.yaml", "configs/demo/sphinx.yaml"
ROOT = Path("runs/demo")
RANKS = 2
STAGES = {"flip": ("masked", "tuned"), "sphinx": ("lm", "real", "real_no_text", "synthetic", "mix")}


def results(root: Path) -> dict[str, Any]:
    """Return the content of every result.json by RUN/STAGE. Raises UserError if one is missing."""
    finished = {}
    for run, stages in STAGES.items():
        for stage in stages:
            path = root / run / stage / "result.json"
            if not path.exists():
                raise UserError(f"{path} is missing: the stage has not finished; run `make demo` again")
            finished[f"{run}/{stage}"] = json.loads(path.read_text())
    return finished


def is_current(root: Path, finished: dict[str, Any]) -> bool:
    """Return True if the summary and the report were written from exactly these results."""
    marker = root / "summary.inputs.json"
    files = (root / "summary.json", root / "report.html", marker)
    return all(path.exists() for path in files) and json.loads(marker.read_text()) == finished


class Clock:
    """Seconds per part of the demo, summed over reruns and saved in `path`. A finished part adds almost nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.seconds, indent=1))


def train(console: Console, clock: Clock) -> int:
    """Train all stages of both recipes in order; `run` skips finished stages. Return the first nonzero exit code."""
    from launch.run import run

    for name, recipe in (("flip", FLIP), ("sphinx", SPHINX)):
        console.print(f"[bold]{name}[/]  {recipe}")
        unfinished = [stage for stage in STAGES[name] if not (ROOT / name / stage / "result.json").exists()]
        with clock.part(name) if unfinished else nullcontext():
            code = run(recipe, ranks_per_node=RANKS)
        if code:
            return code
    return 0


def main() -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks on the CPU, also on a machine with GPUs
    console = Console()
    start = time.monotonic()
    try:
        from launch.demo.data import prepare

        clock = Clock(ROOT / "seconds.json")
        with clock.part("data"):
            prepare()
        code = train(console, clock)
        if code:
            return code
        finished = results(ROOT)
        if is_current(ROOT, finished):
            console.print("summary and report: up to date, skipped")
        else:
            from launch.demo.report import write
            from launch.demo.summary import summarise

            console.print("[bold]evaluation and report[/]")
            with clock.part("evaluation"):
                summary = summarise(ROOT, console)
            summary["seconds"] = clock.seconds
            (ROOT / "summary.json").write_text(json.dumps(summary, indent=1))
            write(ROOT, summary)
            (ROOT / "summary.inputs.json").write_text(json.dumps(finished))
        print_summary(console, json.loads((ROOT / "summary.json").read_text()), time.monotonic() - start)
    except UserError as error:
        print(f"dromos: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("dromos: interrupted; `make demo` continues from here", file=sys.stderr)
        return RUN_AGAIN
    return DONE


def print_summary(console: Console, summary: dict[str, Any], seconds: float) -> None:
    """Print the main metrics and the paths of the summary and the report."""
    flip, sphinx = summary["flip"], summary["sphinx"]
    text, captions = sphinx["text_nll"], sphinx["caption_nll"]["real"]["real"]
    shuffled = sphinx["caption_nll_shuffled"]["real"]["real"]
    lines = [
        f"FLIP classifies handwriting: zero-shot accuracy {flip['zero_shot_top1']:.3f} on "
        f"{flip['held_out']} held-out digits",
        f"SPHINX uses the image for its captions: {captions:.2f} nats per token, "
        f"{shuffled:.2f} with another sample's image",
        f"SPHINX keeps its language model: held-out text {text['before']:.2f} nats per token before, "
        f"{text['with_text']:.2f} with text in every step, {text['without_text']:.2f} without",
        f"merge: {len(summary['merge']['sweep'])} values of beta between the two caption domains",
        f"{ROOT / 'report.html'} and {ROOT / 'summary.json'}  ({seconds:.0f} s)",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
