"""The report on a source as one self-contained HTML page: images with crops, captions, histograms, problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.show.charts import Figure, histogram, scatter
from data_pipeline.show.inspection import inspect_source
from data_pipeline.show.samples import (
    ConversationCard,
    Picture,
    conversation_cards,
    require_pillow,
    sample_pictures,
)
from data_pipeline.show.source_report import SourceReport
from data_pipeline.show.terminal import facts, format_bytes, format_percent, sample_count

TEMPLATES = Path(__file__).resolve().parent / "templates"
MAX_DOCUMENT = 1600  # characters shown of a document
SCORES = {
    "similarity": "Similarity of image and caption",
    "punsafe": "punsafe: probability of unsafe content",
    "pwatermark": "pwatermark: probability of a watermark",
    "aesthetic": "Aesthetic score",
}


@dataclass
class Page:
    """The content of the page. The template escapes every text in it."""

    title: str
    kind: str
    path: str
    tiles: list[tuple[str, str]]
    findings: list[tuple[str, str, list[str]]]
    facts: list[tuple[str, str]]
    foot: str
    bad: list[dict[str, str]] = field(default_factory=list)
    rows: dict[str, Any] | None = None
    pictures: list[Picture] = field(default_factory=list)
    pictures_text: str = ""
    size: int = 0
    conversations: list[ConversationCard] = field(default_factory=list)
    conversations_title: str = ""
    conversations_text: str = ""
    documents: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    figures_text: str = ""
    columns: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    records_head: str = ""


def write_page(path: str, out: str, show: int = 24, images: str | None = None) -> SourceReport:
    """Write the page about the source `path` to the file `out`, with `show` images or records. Return the report.

    `images` is the folder of the images that an instruction file names; the default is the folder of that file.
    Raises UserError as `inspect_source` does, and if Pillow is not installed.
    """
    require_pillow()
    report = inspect_source(path, first=show, images=images)
    storage.publish(out, render_page(report, show, images).encode("utf-8", "replace"))
    return report


def render_page(report: SourceReport, show: int, images: str | None = None) -> str:
    """Return the page as HTML that loads no other file."""
    from markupsafe import Markup

    style = Markup((TEMPLATES / "show.css").read_text(encoding="utf-8"))
    template = _environment().get_template("show.html.j2")
    return template.render(page=build_page(report, show, images), style=style)


@cache
def _environment() -> Any:
    """The Jinja environment. It keeps the compiled template for later pages."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(format_bytes=format_bytes, format_percent=format_percent)
    return environment


def build_page(report: SourceReport, show: int, images: str | None = None) -> Page:
    """Build the content of the page. Reads the images that it shows."""
    about = report.about
    page = Page(
        title=about["path"].rstrip("/").rpartition("/")[2] or about["path"],
        kind=about["kind"],
        path=about["path"],
        tiles=[],
        findings=[],
        facts=facts(about),
        foot="",
        columns=about.get("columns", []),
        rows=_rows(about.get("rows")),
        bad=_with_file_names(about.get("bad", [])),
    )
    if report.form.family == "tars" and about["kind"] != "packed text":
        _add_pictures(page, report, show)
    elif report.form.family in ("conversations", "prompted"):
        _add_conversations(page, report, images)
    elif report.form.family == "documents":
        page.documents = [(url, text[:MAX_DOCUMENT]) for url, text in report.first_documents]
    if not (page.pictures or page.conversations or page.documents):
        page.records = about["first"]
        page.records_head = "documents" if about["kind"] == "packed text" else "caption"
    # `_add_pictures` adds measurements, so these come last.
    figures = _figures(report)
    page.figures = [figure for figure in figures if figure.svg]
    page.figures_text = _figures_text(report, [figure for figure in figures if not figure.svg])
    page.tiles = _tiles(report)
    page.findings = _findings(report)
    page.foot = (
        "Written by dromos data show --html. This file is self-contained: it loads nothing from other places."
    )
    return page


def _add_pictures(page: Page, report: SourceReport, show: int) -> None:
    decoded = report.decoded
    assert decoded is not None
    page.pictures, spec = sample_pictures(decoded.pictured, show)
    page.size = spec.size
    page.pictures_text = (
        f"{len(page.pictures)} of {sample_count(report.about)} samples, evenly spaced over the examined shards and "
        f"decoded as in training. The frame on the left image is a random crop as training draws it: "
        f"{spec.crop[0]:.0%} to {spec.crop[1]:.0%} of the area, with a random flip. The right image is this crop at "
        f"{spec.size} × {spec.size} pixels."
    )
    for name in ("width", "height", "bytes", "words"):
        report.series[name] = getattr(decoded.measurements, name)
    tokens = _token_counts(decoded.measurements.captions)
    if tokens:
        report.series["tokens"] = tokens


def _with_file_names(examples: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Replace the path of each example's file by its name: the page's header has the path of the source."""
    return [example | {"where": example["where"].rpartition("/")[2]} for example in examples]


def _add_conversations(page: Page, report: SourceReport, images: str | None) -> None:
    is_chat = report.form.family == "conversations"
    page.conversations_title = "Conversations" if is_chat else "Prompts and answers"
    page.conversations, missing = conversation_cards(report.about["first"], images or _folder(report))
    if missing:
        page.conversations_text = f"Images that could not be shown: {missing}. The reason is in their place."


def _folder(report: SourceReport) -> str:
    return report.form.files[0].rpartition("/")[0] or "."


def _token_counts(captions: Sequence[str]) -> list[float]:
    """Return CLIP token counts, with start and end token; an empty list if CLIP's vocabulary is not installed."""
    from data_pipeline.transforms.tokenizers import CLIP_BPE, load_tokenizer

    try:
        tokenizer = load_tokenizer(CLIP_BPE)
        return [float(len(tokenizer.encode(caption)) + 2) for caption in captions]
    except (UserError, ImportError):
        return []


def _figures(report: SourceReport) -> list[Figure]:
    series = report.series
    family = report.form.family
    words = {
        "conversations": "Words per answer",
        "prompted": "Words per suffix",
        "documents": "Words per document",
    }.get(family, "Words per caption")
    drawn = [
        scatter("Width and height", series["width"], series["height"]),
        histogram("Bytes per image", series["bytes"], "bytes", log=True),
        histogram(words, series["words"], "words", log=family == "documents"),
        histogram("CLIP tokens per caption", series["tokens"], "tokens"),
        histogram("Turns per conversation", series["turns"], "turns"),
        *(histogram(title, series[name], "") for name, title in SCORES.items()),
    ]
    return [figure for figure in drawn if figure is not None]


def _figures_text(report: SourceReport, constant: Sequence[Figure]) -> str:
    """Return the number of samples examined, and a sentence per measurement that has only one value."""
    measured = max((len(values) for values in report.series.values()), default=0)
    number = measured if report.form.family == "tars" else report.about["examined"]["samples"]
    return " ".join(
        [f"Measured on {number:,} samples.", *(f"{figure.title}: {figure.note}." for figure in constant)]
    )


def _tiles(report: SourceReport) -> list[tuple[str, str]]:
    about = report.about
    size = format_bytes(about["bytes"])
    samples = f"{about['samples']:,}" if about["samples"] is not None else "?"
    if about["samples"] is None and about.get("estimated"):
        samples = f"≈ {about['estimated']:,}"
    tiles = [
        (samples, "rows" if report.form.family in ("pairs", "outcomes") else "samples"),
        (f"{about['shards']:,}", "shards" if report.form.family == "tars" else "files"),
        (size, "in total"),
    ]
    width, height = report.series["width"], report.series["height"]
    if width:
        middle = len(width) // 2
        tiles.append((f"{sorted(width)[middle]:.0f} × {sorted(height)[middle]:.0f}", "median image"))
    words = sorted(report.series["words"])
    if words:
        tiles.append((f"{words[len(words) // 2]:,.0f}", "median words"))
    return tiles


def _findings(report: SourceReport) -> list[tuple[str, str, list[str]]]:
    findings = []
    if report.problems:
        findings.append(("bad", f"Problems: {len(report.problems)}", list(dict.fromkeys(report.problems))))
    else:
        findings.append(("good", "No problems found in the files examined.", []))
    if report.notes:
        findings.append(("warn", "Notes", list(report.notes)))
    return findings


def _rows(sums: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return img2dataset's share of successes and its failures; None if every row succeeded or there are no rows."""
    if not sums or not sums["rows"] or sums["rows"] == sums["successes"]:
        return None
    share = 100 * sums["successes"] / sums["rows"]
    failures = [(reason, f"{count:,}") for reason, count in sums["failures"].items()]
    if sums["other_failures"]:
        failures.append(("others", f"{sums['other_failures']:,}"))
    return {
        "title": f"{sums['successes']:,} of {sums['rows']:,} rows have an image ({share:.1f} %)",
        "percent": share,
        "failures": failures,
    }
