"""Sections of the demo's report that state its findings, with the numbers of summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.report.formatting import duration
from pretrain.report.page import Matrix, Plot, Section, Table
from pretrain.report.plots import Level, Line, bar_plot, line_plot
from pretrain.report.read_run import Run
from pretrain.report.sections import STEP

TEXT_FIGURE = "perplexity/text/nll"
ZERO_SHOT = "zero_shot/digits/top1"
RUN_DEMO = "`make demo` measures it."
NAT = "A nat is the unit of natural logarithms: one nat less makes the right token e = 2.7 times as likely."


def value_at(summary: Mapping[str, Any], *keys: str) -> Any:
    """Return the value at a path of keys; None if a key is missing."""
    value: Any = summary
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def zero_shot_section(run: Run | None, summary: Mapping[str, Any]) -> Section:
    """Zero-shot accuracy during training, and the confusion matrix at its end."""
    section = Section("Zero-shot", "Zero-shot accuracy was not measured")
    flip = summary.get("flip") or {}
    if "zero_shot_top1" in flip:
        chance = f"chance is {1 / len(flip['classes']):.0%}" if flip.get("classes") else "zero-shot"
        section.title = (
            f"FLIP classifies {flip['zero_shot_top1']:.1%} of {flip.get('held_out', '?')} held-out digits correctly "
            f"from sentences; {chance}"
        )
    else:
        section.missing.append(f"summary.json has no zero-shot accuracy. {RUN_DEMO}")
    section.text = [
        "Zero-shot: no classifier is trained. A class is described by sentences, such as “a handwritten digit seven”. "
        "An image is assigned to the class whose mean text feature (over several templates) is closest to the image "
        "feature. Rows of the table are the true digits, columns the predicted ones."
    ]
    curves: list[Line] = []
    first_step = 0
    for name in ("masked", "tuned"):
        stage = run.stage(name) if run is not None else None
        steps, values = stage.evaluations().get(ZERO_SHOT, ([], [])) if stage is not None else ([], [])
        if not values:
            section.missing.append(
                f"Stage {name} has no zero-shot evaluation, so its curve is missing. {RUN_DEMO}"
            )
            continue
        curves.append(Line(name, [first_step + step for step in steps], values, len(curves), markers=True))
        first_step += stage.step if stage is not None else 0
    if curves:
        section.blocks.append(
            line_plot(
                "Zero-shot accuracy",
                curves,
                "step, tuned after masked",
                "accuracy",
                [Level("chance", 0.1)],
            )
        )
    if flip.get("confusion") and flip.get("classes"):
        title = f"Confusion on {flip.get('held_out', '?')} held-out digits"
        section.blocks.append(Matrix(title, flip["classes"], flip["confusion"]))
    else:
        section.missing.append(f"summary.json has no confusion matrix. {RUN_DEMO}")
    return section


def step_time_section(summary: Mapping[str, Any]) -> Section:
    section = Section("Speed of masking", "The step time with masking was not measured")
    seconds = value_at(summary, "flip", "step_seconds")
    if not seconds:
        section.missing.append(f"summary.json has no step times. {RUN_DEMO}")
        return section
    ratios = sorted(seconds, key=float)
    lowest, highest = ratios[0], ratios[-1]
    section.title = (
        f"With {float(highest):.0%} of the patches masked, a step takes {seconds[highest]:.2f} s instead of "
        f"{seconds[lowest]:.2f} s"
    )
    section.text = [
        "Median time of forward, backward and update of one global batch in one process, by the share of masked "
        "patches. The image tower computes only the unmasked patches; the cost of the text tower does not change."
    ]
    names = [f"{float(ratio):.0%}" for ratio in ratios]
    values = [seconds[ratio] for ratio in ratios]
    section.blocks.append(bar_plot("Time per step", names, values, "patches masked", "seconds", ".2f"))
    return section


def forgetting_section(run: Run | None, summary: Mapping[str, Any]) -> Section:
    """NLL of held-out text while the model learns captions, with and without text in every step."""
    section = Section("SPHINX: forgetting", "Held-out text was not measured")
    text = value_at(summary, "sphinx", "text_nll") or {}
    ceiling = value_at(summary, "sphinx", "ln_vocabulary")
    before, kept, lost = (text.get(key) for key in ("before", "with_text", "without_text"))
    if before is not None and lost is not None:
        verb = "forgets" if lost > before else "forgets nothing"
        section.title = f"Without text the language model {verb}: {before:.2f} → {lost:.2f} nats"
        if kept is not None:
            section.title += f"; with text in every step it reaches {kept:.2f}"
    for key, name in (("before", "lm"), ("with_text", "real"), ("without_text", "real_no_text")):
        if key not in text:
            section.missing.append(f"summary.json has no text_nll.{key} (stage {name}). {RUN_DEMO}")
    section.text = [
        "Stage lm trains a language model. Then two stages train on the same captions in the same order: real with a "
        "batch of text in every step, real_no_text without. The curves show the negative log-likelihood per token of "
        f"held-out text; lower is better. {NAT}",
    ]
    if ceiling is not None:
        section.text = [
            *section.text,
            f"A uniform guess over the vocabulary has ln V = {ceiling:.2f} nats.",
        ]
    section.blocks += _text_plot(run, section, before, ceiling)
    return section


def _text_plot(run: Run | None, section: Section, before: float | None, ceiling: float | None) -> list[Plot]:
    curves = []
    for label, name, colour in (
        ("with text (real)", "real", 0),
        ("without text (real_no_text)", "real_no_text", 1),
    ):
        stage = run.stage(name) if run is not None else None
        steps, values = stage.evaluations().get(TEXT_FIGURE, ([], [])) if stage is not None else ([], [])
        if not values:
            section.missing.append(
                f"Stage {name} has no evaluation of text, so its curve is missing. {RUN_DEMO}"
            )
            continue
        if before is not None:
            steps, values = [0, *steps], [before, *values]
        curves.append(Line(label, steps, values, colour, markers=True))
    if not curves:
        return []
    levels = [] if before is None else [Level(f"before (lm): {before:.2f}", before)]
    if ceiling is not None:
        levels.append(Level(f"ln V: {ceiling:.2f}", ceiling, 5))
    return [line_plot("Held-out text during caption training", curves, STEP, "nats per token", levels)]


def caption_loss_section(summary: Mapping[str, Any]) -> Section:
    """NLL of captions with their own image, and with the image of another sample."""
    section = Section("SPHINX: captions", "Held-out captions were not measured")
    true, other = (value_at(summary, "sphinx", key) or {} for key in ("caption_nll", "caption_nll_shuffled"))
    if not true or not other:
        section.missing.append(f"summary.json has no caption_nll or no caption_nll_shuffled. {RUN_DEMO}")
        return section
    own, foreign = value_at(true, "real", "real"), value_at(other, "real", "real")
    if own is not None and foreign is not None:
        section.title = (
            f"SPHINX uses the image for its captions: {own:.2f} nats per token with the right image, "
            f"{foreign:.2f} with another"
        )
    else:
        section.title = "Captions with their own image and with another sample's"
    section.text = [
        "Negative log-likelihood per token of held-out captions. Shuffled: each caption gets the image of another "
        "sample, so the model can use only the language; the difference is the information from the image. "
        "Stage real is trained on alt text, synthetic continues with full sentences, mix is the mean of their weights."
    ]
    rows = []
    for stage, domains in true.items():
        for domain, value in domains.items():
            shuffled = value_at(other, stage, domain)
            gain = ["–", "–"] if shuffled is None else [f"{shuffled:.3f}", f"{shuffled - value:+.3f}"]
            rows.append([stage, domain, f"{value:.3f}", *gain])
    head = ["stage", "captions", "own image", "shuffled", "difference"]
    section.blocks.append(Table(head, rows, left=2, title="Held-out captions (nats per token)"))
    return section


def merging_section(summary: Mapping[str, Any]) -> Section:
    """NLL over beta, the weight of real in the interpolation."""
    section = Section("Merging", "No checkpoints were interpolated")
    sweep = value_at(summary, "merge", "sweep")
    if not sweep:
        section.missing.append(f"summary.json has no merge.sweep. {RUN_DEMO}")
        return section
    sweep = sorted(sweep, key=lambda row: row["beta"])
    best = min(sweep, key=lambda row: row["nll_real"] + row["nll_synthetic"])
    section.title = (
        f"An interpolated model has the lowest sum of both losses: at β = {best['beta']:g}, "
        f"{best['nll_real']:.2f} nats on alt text and {best['nll_synthetic']:.2f} on sentences"
    )
    if best["beta"] in (0, 1):
        section.title = "Interpolation of two models: one of the two has the lowest sum of both losses"
    section.text = [
        "Every weight is β · real + (1 − β) · synthetic: β = 1 is the model trained on alt text, β = 0 the model that "
        "continues with full sentences. There is no further training: each point is one set of interpolated weights, "
        "evaluated on held-out captions of both domains and on held-out text.",
    ]
    betas = [row["beta"] for row in sweep]
    names = (
        ("alt text captions (real)", "nll_real"),
        ("sentence captions (synthetic)", "nll_synthetic"),
        ("text", "nll_text"),
    )
    curves = [
        Line(label, betas, [row[key] for row in sweep], colour, markers=True)
        for colour, (label, key) in enumerate(names)
    ]
    section.blocks.append(line_plot("Interpolated weights", curves, "β", "nats per token", whole_steps=False))
    rows = [[f"{row['beta']:g}", *(f"{row[key]:.3f}" for _, key in names)] for row in sweep]
    section.blocks.append(
        Table(["β", "alt text", "sentences", "text"], rows, left=0, title="The same values", boxed=True)
    )
    return section


def time_section(summary: Mapping[str, Any]) -> Section:
    section = Section("Time", "The time of the demo's parts was not recorded")
    seconds = summary.get("seconds") or {}
    if not seconds:
        section.missing.append(f"summary.json has no seconds. {RUN_DEMO}")
        return section
    total = sum(seconds.values())
    section.title = f"The demo took {duration(total)}, including the start-up of every part"
    rows = [[part, f"{took:.1f}", f"{took / total:.0%}" if total else "–"] for part, took in seconds.items()]
    section.blocks.append(Table(["part", "seconds", "share"], rows))
    return section
