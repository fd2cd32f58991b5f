"""`make demo`: data, FLIP, SPHINX, a merge and a sweep, then summary.json and the report; done parts are skipped."""

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
from pretrain.run.exit_codes import DONE, GO_ON, USER_ERROR

FLIP, SPHINX = "configs/demo/flip.yaml", "configs/demo/sphinx.yaml"


ROOT = Path("runs/demo")
RANKS = 2
STAGES = {"flip": ("masked", "tuned"), "sphinx": ("lm", "real", "real_no_text", "synthetic", "mix")}


def results(root: Path) -> dict[str, Any]:
    """What every stage left as its result, by RUN/STAGE; raises if one is missing."""
    found = {}
    for run, stages in STAGES.items():
        for stage in stages:
            path = root / run / stage / "result.json"
            if not path.exists():
                raise UserError(f"{path} is missing: the stage has not finished; run `make demo` again")
            found[f"{run}/{stage}"] = json.loads(path.read_text())
    return found


def is_current(root: Path, finished: dict[str, Any]) -> bool:
    """Whether the summary and the report were made from exactly these results."""
    marker = root / "summary.inputs.json"
    made = (root / "summary.json", root / "report.html", marker)
    return all(path.exists() for path in made) and json.loads(marker.read_text()) == finished


class Clock:
    """Seconds by part, added up over reruns; a part that finds everything done adds next to nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.seconds, indent=1))


def train(console: Console, clock: Clock) -> int:
    """Both recipes, every stage in order; `run` skips a stage that is done. Stops at the first that fails."""
    from launch.run import run

    for name, recipe in (("flip", FLIP), ("sphinx", SPHINX)):
        console.print(f"[bold]{name}[/]  {recipe}")
        left = [stage for stage in STAGES[name] if not (ROOT / name / stage / "result.json").exists()]
        with clock.part(name) if left else nullcontext():
            code = run(recipe, ranks_per_node=RANKS)
        if code:
            return code
    return 0


def main() -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks on the CPU, whatever the machine holds
    console = Console()
    began = time.monotonic()
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
            console.print("summary and report: made before, skipped")
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
        tell(console, json.loads((ROOT / "summary.json").read_text()), time.monotonic() - began)
    except UserError as error:
        print(f"dromos: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("dromos: interrupted; `make demo` goes on from here", file=sys.stderr)
        return GO_ON
    return DONE


def tell(console: Console, summary: dict[str, Any], seconds: float) -> None:
    """The story in a few lines."""
    flip, sphinx = summary["flip"], summary["sphinx"]
    text, captions = sphinx["text_nll"], sphinx["caption_nll"]["real"]["real"]
    shuffled = sphinx["caption_nll_shuffled"]["real"]["real"]
    lines = [
        f"FLIP reads handwriting: {flip['zero_shot_top1']:.3f} zero-shot on {flip['held_out']} held-out digits",
        f"SPHINX captions what it sees: {captions:.2f} nats a token, {shuffled:.2f} with another sample's image",
        f"and keeps writing: held-out text {text['before']:.2f} nats before, {text['with_text']:.2f} with text in "
        f"every step, {text['without_text']:.2f} without",
        f"merged: {len(summary['merge']['sweep'])} betas between its two caption domains",
        f"{ROOT / 'report.html'} and {ROOT / 'summary.json'}  ({seconds:.0f} s)",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
