"""`dromos report RUN`: writes any run folder as one self-contained HTML page with plots."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.storage.files import publish
from pretrain.report.formatting import duration, number
from pretrain.report.page import Page, Tile, Tiles, render
from pretrain.report.read_run import Run, read_run
from pretrain.report.sections import (
    environment,
    evaluations,
    losses,
    optimisation,
    recipes,
    samples,
    stages,
    throughput,
)


def write(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path. Raises UserError if `run_dir` is not a run folder."""
    folder = Path(run_dir)
    out = folder / "report.html"
    publish(out, render(build_page(read_run(folder))).encode("utf-8"))
    return out


def build_page(run: Run) -> Page:
    """Build the report of one run."""
    runs = [run]
    done = sum(stage.state == "done" for stage in run.stages)
    seconds = sum(stage.sum_of("time/step") + stage.sum_of("time/eval") for stage in run.stages)
    served = sum(sum(stage.samples().values()) for stage in run.stages)
    replaced = sum(sum(stage.replaced().values()) for stage in run.stages)
    skipped = sum(len(stage.incidents().skipped) for stage in run.stages)
    tiles = [
        Tile(f"{done} of {len(run.stages)}", "stages done"),
        Tile(
            number(sum(stage.step for stage in run.stages)),
            "optimizer steps",
            f"{number(skipped)} skipped" if skipped else "",
        ),
        Tile(number(served), "samples served", f"{number(replaced)} replaced"),
        Tile(duration(seconds), "in training steps and evaluations"),
    ]
    return Page(
        title=f"Run {run.name}",
        lead=f"The stages of {run.folder}: progress, losses, held-out metrics, throughput and samples.",
        sections=[
            stages(runs),
            losses(runs),
            evaluations(runs),
            optimisation(runs),
            throughput(runs),
            samples(runs),
            environment(runs),
            recipes(runs),
        ],
        tiles=Tiles(tiles),
        foot=f"Written by `dromos report {run.folder}` from the files of the run folder.",
    )
