"""The demo's report, `runs/demo/report.html`: all runs on one page. Its measured numbers come from summary.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage.files import publish
from launch.demo.pictures import caption_cards, masked_cards, sample_cards
from launch.demo.sections import (
    caption_loss_section,
    forgetting_section,
    merging_section,
    step_time_section,
    time_section,
    value_at,
    zero_shot_section,
)
from pretrain.report import sections
from pretrain.report.formatting import duration
from pretrain.report.page import Block, Collapsible, Gallery, Page, Section, Tile, Tiles, render
from pretrain.report.read_run import Run, read_run
from pretrain.report.sections import FLOOR_TEXT, loss_plot

CAPTIONERS = ("real", "synthetic", "mix")
Summary = Mapping[str, Any]


def write(root: Path = Path("runs/demo"), summary: dict[str, Any] | None = None) -> Path:
    """Write `root/report.html` from the runs `root/flip` and `root/sphinx` and return its path.

    `summary` is the content of `root/summary.json`; None reads the file. Raises UserError if neither run exists, or
    if the summary does not exist. The page names every missing stage, evaluation and figure.
    """
    root = Path(root)
    runs = read_runs(root)
    if summary is None:
        summary = read_summary(root / "summary.json")
    out = root / "report.html"
    publish(out, render(build_page(root, runs, summary)).encode("utf-8"))
    return out


def read_runs(root: Path) -> dict[str, Run]:
    """Read the existing runs of the demo, by name. Raises UserError if there is none."""
    runs = {}
    for name in ("flip", "sphinx"):
        if (root / name).is_dir():
            runs[name] = read_run(root / name)
    if not runs:
        raise UserError(
            f"{root} holds neither flip nor sphinx, so there is nothing to report; `make demo` trains both"
        )
    return runs


def read_summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `make demo` writes it") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run `make demo`") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a JSON object; delete it and run `make demo`")
    return content


def build_page(root: Path, runs: Mapping[str, Run], summary: Summary) -> Page:
    flip, sphinx = runs.get("flip"), runs.get("sphinx")
    all_runs = list(runs.values())
    return Page(
        title="Dromos demo: results",
        lead=(
            "On two CPU cores, FLIP learns from masked images to classify real handwriting, SPHINX learns to caption "
            "images and keeps its language model, and two SPHINX checkpoints are interpolated."
        ),
        tiles=Tiles(headlines(summary)),
        sections=[
            data_section(root),
            masking_section(root),
            flip_loss_section(flip),
            zero_shot_section(flip, summary),
            step_time_section(summary),
            sphinx_loss_section(sphinx),
            forgetting_section(sphinx, summary),
            caption_loss_section(summary),
            captions_section(root),
            merging_section(summary),
            sections.stages(all_runs),
            sections.throughput(all_runs),
            sections.samples(all_runs),
            time_section(summary),
            sections.environment(all_runs),
            recipes_section(all_runs, summary),
        ],
        foot=f"Written by `make demo`. The metrics come from {root / 'summary.json'}; curves and throughput come "
        "from the metrics.jsonl of each stage. `dromos report RUN` writes a report of a single run.",
    )


def headlines(summary: Summary) -> list[Tile]:
    """Return tiles with the main metrics, as far as the summary has them."""
    tiles = []
    top1, held_out = value_at(summary, "flip", "zero_shot_top1"), value_at(summary, "flip", "held_out")
    if top1 is not None:
        tiles.append(
            Tile(f"{top1:.1%}", "zero-shot accuracy on digits", f"{held_out} held-out digits; chance is 10%")
        )
    text = summary.get("sphinx", {}).get("text_nll", {})
    if {"before", "with_text", "without_text"} <= text.keys():
        before, kept, lost = text["before"], text["with_text"], text["without_text"]
        for nll, variant in ((lost, "without"), (kept, "with")):
            change = f"{nll - before:+.2f} nats".replace("-", "−")
            tiles.append(
                Tile(change, f"on text, after captions {variant} text", f"{before:.2f} → {nll:.2f} per token")
            )
    true = value_at(summary, "sphinx", "caption_nll", "real", "real")
    other = value_at(summary, "sphinx", "caption_nll_shuffled", "real", "real")
    if true is not None and other is not None:
        note = f"{true:.2f} with its own image, {other:.2f} with another, per token"
        tiles.append(Tile(f"{other - true:.2f} nats", "lower caption loss with the right image", note))
    seconds = summary.get("seconds") or {}
    if seconds:
        tiles.append(Tile(duration(sum(seconds.values())), "total time", "on this machine"))
    return tiles


def fill_section(section: Section, content: str, fill: Callable[[], list[Block]]) -> Section:
    """Set the blocks of the section to the result of `fill`; if it fails, add a line with the reason."""
    try:
        section.blocks = fill()
    except (UserError, OSError) as error:
        section.missing.append(f"{content} cannot be shown: {error}")
    return section


def data_section(root: Path) -> Section:
    section = Section(
        "Data",
        "The data is handwriting and coloured shapes, with two kinds of captions",
        [
            "The digits are real handwriting from scikit-learn. The demo renders the scenes and captions them in two "
            "styles: terse alt text as on the web (scenes_real), and full sentences as a captioning model writes "
            "(scenes_synthetic). The images are small; this page enlarges them without smoothing."
        ],
    )

    def fill() -> list[Block]:
        cards = sample_cards(root / "flip" / "masked")
        return [Gallery(source_cards, title=name) for name, source_cards in cards.items()]

    return fill_section(section, "Samples", fill)


def masking_section(root: Path) -> Section:
    section = Section("Masking", "FLIP learns from the unmasked patches")

    def fill() -> list[Block]:
        masked = masked_cards(root / "flip" / "masked")
        section.title = f"FLIP sees {masked.kept} of {masked.patches} patches of an image"
        section.text = [
            f"Images of the first training step: as the loader serves them, with their random crop, and with "
            f"{masked.ratio:.0%} of the patches masked at random. The image tower computes only the unmasked patches, "
            f"so a step is cheaper. The mask depends on the sample, its epoch and the seed, and not on the rank."
        ]
        return [Gallery(masked.cards, wide=True)]

    return fill_section(section, "Masks", fill)


def flip_loss_section(run: Run | None) -> Section:
    section = Section("FLIP: loss", "FLIP: no loss was logged", [FLOOR_TEXT])
    for name in ("masked", "tuned"):
        stage = run.stage(name) if run is not None else None
        if stage is None or not stage.column("loss")[1]:
            section.missing.append(
                f"Stage {name} of flip has not run, so its curve is missing. `make demo` trains it."
            )
            continue
        section.blocks.append(loss_plot(f"flip/{name}", stage))
        first, last, floor = (stage.column(key)[1] for key in ("loss", "loss", "loss_floor"))
        if name == "masked":
            section.title = f"FLIP learns to match images and captions: loss {first[0]:.2f} → {last[-1]:.2f}"
            if floor:
                section.title += f"; the floor is {floor[-1]:.2f}"
    section.text = [
        "The contrastive loss: each image of the batch must select its caption among all captions, and each caption "
        "its image. Stage tuned continues from masked for a short time with unmasked images, because the model is "
        "trained on masked images and evaluated on unmasked ones.",
        FLOOR_TEXT,
    ]
    return section


def sphinx_loss_section(run: Run | None) -> Section:
    if run is None:
        return Section("SPHINX: loss", "SPHINX: no loss was logged", missing=["No stage of sphinx has run."])
    section = sections.losses([run])
    section.name = "SPHINX: loss"
    section.title = "SPHINX learns language modelling (lm), then captioning together with text"
    section.text = [
        "Each step has both streams, each with its own loss per token. Stage real_no_text is the control without text; "
        "stage synthetic continues from real with the other kind of captions."
    ]
    return section


def captions_section(root: Path) -> Section:
    section = Section(
        "Captions",
        "Generated captions of held-out images",
        [
            "Held-out images of both caption domains with the true caption and the captions of three models, generated "
            "by greedy decoding: real is trained on alt text, synthetic continues with full sentences, mix is the mean "
            "of their weights."
        ],
    )

    def fill() -> list[Block]:
        cards, missing = caption_cards(root / "sphinx", CAPTIONERS)
        section.missing += missing
        return [Gallery(cards, wide=True)] if cards else []

    return fill_section(section, "Generated captions", fill)


def recipes_section(runs: list[Run], summary: Summary) -> Section:
    section = sections.recipes(runs)
    section.name, section.title = "Metrics and recipes", "All metrics and the resolved recipes"
    section.text = ["The summary.json of this page, and the recipe of each run with its defaults filled in."]
    section.blocks.insert(0, Collapsible("summary.json", json.dumps(summary, indent=1)))
    return section
