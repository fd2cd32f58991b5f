"""What the demo's figures say: each finding as a section with the numbers of summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.report.page import Matrix, Plot, Section, Table
from pretrain.report.plots import Level, Line, bar_plot, line_plot
from pretrain.report.read_run import Run
from pretrain.report.sections import STEP, duration

TEXT_FIGURE = "perplexity/text/nll"
ZERO_SHOT = "zero_shot/digits/top1"
AGAIN = "`make demo` makes it."
NAT = "A nat is the unit of natural logarithms: one nat less makes the right token e = 2.7 times as likely."


def value_at(summary: Mapping[str, Any], *keys: str) -> Any:
    """What stands at a path of the summary, None where it ends early."""
    found: Any = summary
    for key in keys:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def reading(run: Run | None, summary: Mapping[str, Any]) -> Section:
    """Zero-shot accuracy over the training, and the confusion at its end."""
    section = Section("Zero-shot", "Zero-shot accuracy was not measured")
    flip = summary.get("flip") or {}
    if "zero_shot_top1" in flip:
        chance = f"chance would be {1 / len(flip['classes']):.0%}" if flip.get("classes") else "zero-shot"
        section.title = (
            f"Asked in sentences, FLIP reads {flip['zero_shot_top1']:.1%} of "
            f"{flip.get('held_out', '?')} held-out digits; {chance}"
        )
    else:
        section.missing.append(f"summary.json holds no zero-shot accuracy. {AGAIN}")
    section.text = [
        "Zero-shot: no classifier is trained. A class is a sentence, such as “a handwritten digit seven”, and an image "
        "belongs to the class whose sentences (the mean over several templates) lie nearest to it in the space that "
        "both towers share. Rows of the table are the true digits, columns what FLIP said."
    ]
    curves: list[Line] = []
    begin = 0
    for name in ("masked", "tuned"):
        stage = run.stage(name) if run is not None else None
        steps, values = stage.evaluations().get(ZERO_SHOT, ([], [])) if stage is not None else ([], [])
        if not values:
            section.missing.append(f"Stage {name} has no zero-shot evaluation: its curve is missing. {AGAIN}")
            continue
        curves.append(Line(name, [begin + step for step in steps], values, len(curves), markers=True))
        begin += stage.step if stage is not None else 0
    if curves:
        section.blocks.append(
            line_plot(
                "Zero-shot accuracy",
                curves,
                "step, tuned after masked",
                "share right",
                [Level("chance", 0.1)],
            )
        )
    if flip.get("confusion") and flip.get("classes"):
        title = f"Confusion on {flip.get('held_out', '?')} held-out digits"
        section.blocks.append(Matrix(title, flip["classes"], flip["confusion"]))
    else:
        section.missing.append(f"summary.json holds no confusion. {AGAIN}")
    return section


def masking_pays(summary: Mapping[str, Any]) -> Section:
    section = Section("Speed of masking", "The time of a masked step was not measured")
    seconds = value_at(summary, "flip", "step_seconds")
    if not seconds:
        section.missing.append(f"summary.json holds no step times. {AGAIN}")
        return section
    ratios = sorted(seconds, key=float)
    whole, highest = ratios[0], ratios[-1]
    section.title = (
        f"With {float(highest):.0%} of the patches masked, a step takes {seconds[highest]:.2f} s instead of "
        f"{seconds[whole]:.2f} s"
    )
    section.text = [
        "Median time of forward, backward and update of one whole batch in one process, by the share of patches that "
        "are masked. The image tower computes only on patches that are left; the text tower's share stays as it is."
    ]
    names = [f"{float(ratio):.0%}" for ratio in ratios]
    values = [seconds[ratio] for ratio in ratios]
    section.blocks.append(bar_plot("Time of a step", names, values, "patches masked", "seconds", ".2f"))
    return section


def forgetting(run: Run | None, summary: Mapping[str, Any]) -> Section:
    """SPHINX's figure: held-out text while the model learns to caption, with and without text in every step."""
    section = Section("SPHINX: forgetting", "Held-out text was not measured")
    text = value_at(summary, "sphinx", "text_nll") or {}
    ceiling = value_at(summary, "sphinx", "ln_vocabulary")
    before, kept, lost = (text.get(key) for key in ("before", "with_text", "without_text"))
    if before is not None and lost is not None:
        verb = "forgets" if lost > before else "forgets nothing"
        section.title = f"Without text the language model {verb}: {before:.2f} → {lost:.2f} nats"
        if kept is not None:
            section.title += f"; with text in every step it goes to {kept:.2f}"
    for key, name in (("before", "lm"), ("with_text", "real"), ("without_text", "real_no_text")):
        if key not in text:
            section.missing.append(f"summary.json holds no text_nll.{key} (stage {name}). {AGAIN}")
    section.text = [
        "Stage lm has learnt to write. Then the same captions in the same order are learnt twice: once with a batch of "
        "text in every step (real), once without (real_no_text). The curves are the negative log-likelihood a token of "
        f"held-out text: lower is better. {NAT}",
    ]
    if ceiling is not None:
        section.text = [
            *section.text,
            f"Guessing among all tokens alike would cost ln V = {ceiling:.2f} nats.",
        ]
    section.blocks += [*_text_plot(run, section, before, ceiling)]
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
            section.missing.append(f"Stage {name} has no evaluation of text: its curve is missing. {AGAIN}")
            continue
        if before is not None:
            steps, values = [0, *steps], [before, *values]
        curves.append(Line(label, steps, values, colour, markers=True))
    if not curves:
        return []
    levels = [] if before is None else [Level(f"before (lm): {before:.2f}", before)]
    if ceiling is not None:
        levels.append(Level(f"ln V: {ceiling:.2f}", ceiling, 5))
    return [line_plot("Held-out text while captions are learnt", curves, STEP, "nats a token", levels)]


def captioning(summary: Mapping[str, Any]) -> Section:
    """Captions with their own image against another sample's."""
    section = Section("SPHINX: captions", "Held-out captions were not measured")
    true, other = (value_at(summary, "sphinx", key) or {} for key in ("caption_nll", "caption_nll_shuffled"))
    if not true or not other:
        section.missing.append(f"summary.json holds no caption_nll, or none with shuffled images. {AGAIN}")
        return section
    own, foreign = value_at(true, "real", "real"), value_at(other, "real", "real")
    if own is not None and foreign is not None:
        section.title = (
            f"The captions are about the image: {own:.2f} nats a token with the right one, "
            f"{foreign:.2f} with another"
        )
    else:
        section.title = "Captions with their own image and with another sample's"
    section.text = [
        "Negative log-likelihood a token of held-out captions. Shuffled: each caption is given another sample's image, "
        "which shows what the language alone explains; the difference is what the model takes from the image. "
        "Stage real has learnt from alt-text, synthetic went on with full sentences, mix is the mean of their weights."
    ]
    rows = []
    for stage, domains in true.items():
        for domain, value in domains.items():
            shuffled = value_at(other, stage, domain)
            gain = ["–", "–"] if shuffled is None else [f"{shuffled:.3f}", f"{shuffled - value:+.3f}"]
            rows.append([stage, domain, f"{value:.3f}", *gain])
    head = ["stage", "captions", "own image", "shuffled", "difference"]
    section.blocks.append(Table(head, rows, left=2, title="Held-out captions (nats a token)"))
    return section


def merging(summary: Mapping[str, Any]) -> Section:
    """The beta curve."""
    section = Section("Merging", "Two checkpoints were not interpolated")
    sweep = value_at(summary, "merge", "sweep")
    if not sweep:
        section.missing.append(f"summary.json holds no merge.sweep. {AGAIN}")
        return section
    sweep = sorted(sweep, key=lambda row: row["beta"])
    best = min(sweep, key=lambda row: row["nll_real"] + row["nll_synthetic"])
    section.title = (
        f"Between two specialists lies a generalist: at β = {best['beta']:g}, {best['nll_real']:.2f} nats on alt-text "
        f"and {best['nll_synthetic']:.2f} on sentences"
    )
    if best["beta"] in (0, 1):
        section.title = "Interpolating two specialists: one of them is the best on both together"
    section.text = [
        "Every weight is β · real + (1 − β) · synthetic: β = 1 is the model trained on alt-text, β = 0 the one that "
        "went on with full sentences. Nothing is trained in between: each point is one set of interpolated weights, "
        "measured on held-out captions of both domains and on text.",
    ]
    betas = [row["beta"] for row in sweep]
    names = (
        ("alt-text captions (real)", "nll_real"),
        ("sentence captions (synthetic)", "nll_synthetic"),
        ("text", "nll_text"),
    )
    curves = [
        Line(label, betas, [row[key] for row in sweep], colour, markers=True)
        for colour, (label, key) in enumerate(names)
    ]
    section.blocks.append(line_plot("Interpolated weights", curves, "β", "nats a token", whole_steps=False))
    rows = [[f"{row['beta']:g}", *(f"{row[key]:.3f}" for _, key in names)] for row in sweep]
    section.blocks.append(
        Table(["β", "alt-text", "sentences", "text"], rows, left=0, title="The same in numbers", boxed=True)
    )
    return section


def parts_of_the_time(summary: Mapping[str, Any]) -> Section:
    section = Section("Time", "The time of the demo's parts was not recorded")
    seconds = summary.get("seconds") or {}
    if not seconds:
        section.missing.append(f"summary.json holds no seconds. {AGAIN}")
        return section
    total = sum(seconds.values())
    section.title = f"The demo took {duration(total)}, start-up of every part included"
    rows = [[part, f"{took:.1f}", f"{took / total:.0%}" if total else "–"] for part, took in seconds.items()]
    section.blocks.append(Table(["part", "seconds", "share"], rows))
    return section
