"""The demo's story on one page, `runs/demo/report.html`; every number in it is read from summary.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage.files import publish
from launch.demo.pictures import caption_cards, masked_cards, sample_cards
from launch.demo.sections import (
    captioning,
    forgetting,
    masking_pays,
    merging,
    parts_of_the_time,
    reading,
    value_at,
)
from pretrain.report import sections
from pretrain.report.page import Block, Collapsible, Gallery, Page, Section, Tile, Tiles, render
from pretrain.report.read_run import Run, read_run
from pretrain.report.sections import FLOOR_TEXT, duration, loss_plot

CAPTIONERS = ("real", "synthetic", "mix")
Summary = Mapping[str, Any]


def write(root: Path = Path("runs/demo"), summary: dict[str, Any] | None = None) -> Path:
    """Write `root/report.html` from the runs `root/flip` and `root/sphinx` and return its path.

    `summary` is the content of `root/summary.json`, which is read when absent. Raises UserError when the runs or
    the summary are not there; a stage, an evaluation or a figure that is missing is said so on the page.
    """
    root = Path(root)
    runs = read_runs(root)
    if summary is None:
        summary = read_summary(root / "summary.json")
    out = root / "report.html"
    publish(out, render(page(root, runs, summary)).encode("utf-8"))
    return out


def read_runs(root: Path) -> dict[str, Run]:
    """The demo's runs that are there, by name."""
    runs = {}
    for name in ("flip", "sphinx"):
        if (root / name).is_dir():
            runs[name] = read_run(root / name)
    if not runs:
        raise UserError(
            f"{root}: holds neither flip nor sphinx, so there is nothing to tell; `make demo` makes both"
        )
    return runs


def read_summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; `make demo` writes it") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); delete it and run `make demo`") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: an object is expected; delete it and run `make demo`")
    return content


def page(root: Path, runs: Mapping[str, Run], summary: Summary) -> Page:
    flip, sphinx = runs.get("flip"), runs.get("sphinx")
    every = list(runs.values())
    return Page(
        title="Dromos: what the demo learnt",
        lead=(
            "On two CPU cores, FLIP learns from masked images to read real handwriting, SPHINX learns to caption "
            "without forgetting how to write, and two of its checkpoints are interpolated."
        ),
        tiles=Tiles(headlines(summary)),
        sections=[
            data(root),
            masks(root),
            flip_loss(flip),
            reading(flip, summary),
            masking_pays(summary),
            sphinx_loss(sphinx),
            forgetting(sphinx, summary),
            captioning(summary),
            captions(root),
            merging(summary),
            sections.stages(every),
            sections.throughput(every),
            sections.samples(every),
            parts_of_the_time(summary),
            sections.environment(every),
            everything(every, summary),
        ],
        foot=f"Written by `make demo`. The figures are those of {root / 'summary.json'}; curves and rates come from "
        "the metrics.jsonl of each stage. `dromos report RUN` writes more of a single run.",
    )


def headlines(summary: Summary) -> list[Tile]:
    """The demo in a few large figures, as far as the summary goes."""
    tiles = []
    top1, held_out = value_at(summary, "flip", "zero_shot_top1"), value_at(summary, "flip", "held_out")
    if top1 is not None:
        tiles.append(
            Tile(f"{top1:.1%}", "of digits read zero-shot", f"of {held_out} held out; chance is 10%")
        )
    text = summary.get("sphinx", {}).get("text_nll", {})
    if {"before", "with_text", "without_text"} <= text.keys():
        before, kept, lost = text["before"], text["with_text"], text["without_text"]
        for nll, how in ((lost, "without"), (kept, "with")):
            change = f"{nll - before:+.2f} nats".replace("-", "−")
            tiles.append(
                Tile(change, f"on text, learning captions {how} text", f"{before:.2f} → {nll:.2f} a token")
            )
    true = value_at(summary, "sphinx", "caption_nll", "real", "real")
    other = value_at(summary, "sphinx", "caption_nll_shuffled", "real", "real")
    if true is not None and other is not None:
        note = f"{true:.2f} against {other:.2f} a token with another image"
        tiles.append(Tile(f"{other - true:.2f} nats", "gained by seeing the image", note))
    seconds = summary.get("seconds") or {}
    if seconds:
        tiles.append(Tile(duration(sum(seconds.values())), "for everything", "on this machine"))
    return tiles


def tolerant(section: Section, what: str, fill: Callable[[], list[Block]]) -> Section:
    """The section with the pieces that `fill` makes, or with a line that says why they are missing."""
    try:
        section.blocks = fill()
    except (UserError, OSError) as error:
        section.missing.append(f"{what} cannot be shown: {error}")
    return section


def data(root: Path) -> Section:
    section = Section(
        "Data",
        "The models see handwriting and coloured shapes, captioned in two manners",
        [
            "The digits are scikit-learn's real handwriting. The scenes are drawn by the demo and captioned in two "
            "manners: terse alt-text as on the web (scenes_real), and the full sentences that a captioning model "
            "writes (scenes_synthetic). The images are small, and enlarged here without smoothing."
        ],
    )

    def fill() -> list[Block]:
        cards = sample_cards(root / "flip" / "masked")
        return [Gallery(found, title=name) for name, found in cards.items()]

    return tolerant(section, "Samples", fill)


def masks(root: Path) -> Section:
    section = Section("Masking", "FLIP learns from the patches that are left")

    def fill() -> list[Block]:
        masked = masked_cards(root / "flip" / "masked")
        section.title = f"FLIP sees {masked.kept} of {masked.patches} patches of an image"
        section.text = [
            f"Rows of the first training step: the image as the loader served it (with its random crop), and the "
            f"patches that are left when {masked.ratio:.0%} are masked at random. The tower computes only on those, "
            f"so a step costs less. The mask is a function of the sample, its epoch and the seed, the same on any rank."
        ]
        return [Gallery(masked.cards, wide=True)]

    return tolerant(section, "Masks", fill)


def flip_loss(run: Run | None) -> Section:
    section = Section("FLIP: loss", "FLIP's loss was not logged", [FLOOR_TEXT])
    for name in ("masked", "tuned"):
        stage = run.stage(name) if run is not None else None
        if stage is None or not stage.column("loss")[1]:
            section.missing.append(
                f"Stage {name} of flip has not run: its curve is missing. `make demo` makes it."
            )
            continue
        section.blocks.append(loss_plot(f"flip/{name}", stage))
        first, last, floor = (stage.column(key)[1] for key in ("loss", "loss", "loss_floor"))
        if name == "masked":
            section.title = (
                f"FLIP matches images with captions: its loss falls from {first[0]:.2f} to {last[-1]:.2f}"
            )
            if floor:
                section.title += f", and {floor[-1]:.2f} is the floor"
    section.text = [
        "In every step each image of the batch looks for its caption among all of them, and each caption for its "
        "image. Stage tuned goes on from masked with whole images for a short time, which closes the gap between "
        "training on parts of images and being asked about whole ones.",
        FLOOR_TEXT,
    ]
    return section


def sphinx_loss(run: Run | None) -> Section:
    if run is None:
        return Section(
            "SPHINX: loss", "SPHINX's loss was not logged", missing=["No stage of sphinx has run."]
        )
    section = sections.losses([run])
    section.name = "SPHINX: loss"
    section.title = "SPHINX learns to write (lm), then to caption while it goes on reading text"
    section.text = [
        "Both streams are in every step, each with its own loss a token. Stage real_no_text is the control without "
        "text; synthetic goes on from real with the other manner of captioning."
    ]
    return section


def captions(root: Path) -> Section:
    section = Section(
        "Captions",
        "What the models say about images they have never seen",
        [
            "Held-out images of both caption domains, the true caption, and what three sets of weights write, token by "
            "token the most likely: real has learnt from alt-text, synthetic went on with full sentences, mix is the "
            "mean of both."
        ],
    )

    def fill() -> list[Block]:
        cards, missing = caption_cards(root / "sphinx", CAPTIONERS)
        section.missing += missing
        return [Gallery(cards, wide=True)] if cards else []

    return tolerant(section, "Generated captions", fill)


def everything(runs: list[Run], summary: Summary) -> Section:
    section = sections.recipes(runs)
    section.name, section.title = "Figures and recipes", "All figures and the resolved recipes"
    section.text = [
        "summary.json as the page was made from it, and each run's recipe with its defaults laid in."
    ]
    section.blocks.insert(0, Collapsible("summary.json", json.dumps(summary, indent=1)))
    return section
