"""A survey as one self-contained HTML page: pictures with their crops, captions, sizes, and what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.show.charts import Figure, histogram, scatter
from data_pipeline.show.inspection import survey
from data_pipeline.show.samples import Picture, Talk, look_at, talks
from data_pipeline.show.source_report import Bad, SourceReport, share
from data_pipeline.show.terminal import facts, percent, readable
from data_pipeline.show.terminal import samples as counted

TEMPLATES = Path(__file__).resolve().parent / "templates"
PASSAGE = 1600  # characters of a document
NAMES = {
    "similarity": "Similarity of picture and caption",
    "punsafe": "punsafe: chance of being unsafe",
    "pwatermark": "pwatermark: chance of a watermark",
    "aesthetic": "Aesthetic score",
}


@dataclass
class Page:
    """What the template lays out; every text in it is escaped there."""

    title: str
    kind: str
    path: str
    tiles: list[tuple[str, str]]
    verdicts: list[tuple[str, str, list[str]]]
    facts: list[tuple[str, str]]
    foot: str
    bad: list[dict[str, str]] = field(default_factory=list)
    rows: dict[str, Any] | None = None
    pictures: list[Picture] = field(default_factory=list)
    pictures_text: str = ""
    size: int = 0
    talks: list[Talk] = field(default_factory=list)
    talks_title: str = ""
    talks_text: str = ""
    passages: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    figures_text: str = ""
    columns: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    records_head: str = ""


def write_page(path: str, out: str, show: int = 24, images: str | None = None) -> SourceReport:
    """Write the page about the source `path` to the file `out`, with `show` pictures or records; the survey.

    `images` is the folder of the pictures of an instruction file, where that is not the file's own. Raises
    UserError as `survey` does, and where Pillow is not installed.
    """
    found = survey(path, first=show, images=images)
    storage.publish(out, render_page(found, show, images).encode("utf-8", "replace"))
    return found


def render_page(found: SourceReport, show: int, images: str | None = None) -> str:
    """The page as HTML that needs nothing from outside."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(readable=readable, percent=percent)
    style = Markup((TEMPLATES / "show.css").read_text(encoding="utf-8"))
    return environment.get_template("show.html.j2").render(page=build(found, show, images), style=style)


def build(found: SourceReport, show: int, images: str | None = None) -> Page:
    """The pieces of the page; pictures are read and decoded here, and what is wrong with them is added."""
    about = found.about
    page = Page(
        title=about["path"].rstrip("/").rpartition("/")[2] or about["path"],
        kind=about["kind"],
        path=about["path"],
        tiles=[],
        verdicts=[],
        facts=facts(about),
        foot="",
        columns=about.get("columns", []),
        rows=_rows(about.get("rows")),
        bad=_named(about.get("bad", [])),
    )
    if found.form.family == "tars" and about["kind"] != "packed text":
        _add_pictures(page, found, show)
    elif found.form.family in ("conversations", "prompted"):
        _add_talks(page, found, images)
    elif found.form.family == "documents":
        page.passages = [(url, text[:PASSAGE]) for url, text in found.passages]
    if not (page.pictures or page.talks or page.passages):
        page.records = about["first"]
        page.records_head = "documents" if about["kind"] == "packed text" else "caption"
    figures = _figures(found)
    page.figures = [figure for figure in figures if figure.svg]
    page.figures_text = _examined(found, [figure for figure in figures if not figure.svg])
    page.tiles = _tiles(found)
    page.verdicts = _verdicts(found)
    page.foot = (
        "Made by dromos data show --html. Everything is in this file; it loads nothing from elsewhere."
    )
    return page


def _add_pictures(page: Page, found: SourceReport, show: int) -> None:
    look = look_at(found.tables, show)
    page.pictures, page.size = look.pictures, look.spec.size
    page.pictures_text = (
        f"{len(look.pictures)} of {counted(found.about)} samples, spread over the shards examined, decoded as "
        f"training decodes them. The frame is a crop as training would draw it: {look.spec.crop[0]:.0%} to "
        f"{look.spec.crop[1]:.0%} of the area, mirrored by chance; beside it what that becomes at "
        f"{look.spec.size} × {look.spec.size}."
    )
    for name in ("width", "height", "bytes", "words"):
        found.series[name] = getattr(look.figures, name)
    tokens = _tokens(look.figures.captions)
    if tokens:
        found.series["tokens"] = tokens
    bad = Bad()
    for verdict in look.bad:
        bad.add(verdict)
    if bad.counts:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in bad.counts.most_common())
        found.problems.append(
            f"{share(len(look.bad), look.examined)} samples decoded cannot be used: {listed}"
        )
    page.bad += _named(bad.examples)


def _named(examples: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Examples with the file's name for its path, which stands above."""
    return [one | {"where": one["where"].rpartition("/")[2]} for one in examples]


def _add_talks(page: Page, found: SourceReport, images: str | None) -> None:
    page.talks_title = "Conversations" if found.form.family == "conversations" else "Prompts and answers"
    page.talks, missing = talks(found.about["first"], images or _folder(found))
    if missing:
        page.talks_text = f"Pictures that could not be shown: {missing}. Each says why."


def _folder(found: SourceReport) -> str:
    return found.form.files[0].rpartition("/")[0] or "."


def _tokens(captions: Sequence[str]) -> list[float]:
    """Lengths in CLIP's tokens with start and end, where its vocabulary is installed."""
    from data_pipeline.transforms.tokenizers import CLIP_BPE, load_tokenizer

    try:
        tokenizer = load_tokenizer(CLIP_BPE)
        return [float(len(tokenizer.encode(caption)) + 2) for caption in captions]
    except (UserError, ImportError):
        return []


def _figures(found: SourceReport) -> list[Figure]:
    series = found.series
    family = found.form.family
    words = {
        "conversations": "Words of an answer",
        "prompted": "Words of a suffix",
        "documents": "Words of a document",
    }.get(family, "Words of a caption")
    drawn = [
        scatter("Width and height", series["width"], series["height"]),
        histogram("Bytes of a picture", series["bytes"], "bytes", log=True),
        histogram(words, series["words"], "words", log=family == "documents"),
        histogram("CLIP's tokens of a caption", series["tokens"], "tokens"),
        histogram("Turns of a conversation", series["turns"], "turns"),
        *(histogram(title, series[name], "") for name, title in NAMES.items()),
    ]
    return [figure for figure in drawn if figure is not None]


def _examined(found: SourceReport, same: Sequence[Figure]) -> str:
    """How many were examined, and of what there is nothing to draw because all are the same."""
    drawn = max((len(values) for values in found.series.values()), default=0)
    number = drawn if found.form.family == "tars" else found.about["examined"]["samples"]
    return " ".join([f"Of {number:,} samples examined.", *(f"{one.title}: {one.note}." for one in same)])


def _tiles(found: SourceReport) -> list[tuple[str, str]]:
    about = found.about
    size = readable(about["bytes"])
    samples = f"{about['samples']:,}" if about["samples"] is not None else "?"
    if about["samples"] is None and about.get("estimated"):
        samples = f"≈ {about['estimated']:,}"
    tiles = [
        (samples, "rows" if found.form.family in ("pairs", "outcomes") else "samples"),
        (f"{about['shards']:,}", "shards" if found.form.family == "tars" else "files"),
        (size, "in all"),
    ]
    width, height = found.series["width"], found.series["height"]
    if width:
        middle = len(width) // 2
        tiles.append((f"{sorted(width)[middle]:.0f} × {sorted(height)[middle]:.0f}", "median picture"))
    words = sorted(found.series["words"])
    if words:
        tiles.append((f"{words[len(words) // 2]:,.0f}", "median words"))
    return tiles


def _verdicts(found: SourceReport) -> list[tuple[str, str, list[str]]]:
    verdicts = []
    if found.problems:
        verdicts.append(("bad", f"Wrong: {len(found.problems)}", list(dict.fromkeys(found.problems))))
    else:
        verdicts.append(("good", "Nothing wrong was found in what was examined.", []))
    if found.notes:
        verdicts.append(("warn", "Worth knowing", list(found.notes)))
    return verdicts


def _rows(sums: dict[str, Any] | None) -> dict[str, Any] | None:
    """The story of img2dataset's rows; None where every row succeeded or nothing is known."""
    if not sums or not sums["rows"] or sums["rows"] == sums["successes"]:
        return None
    share = 100 * sums["successes"] / sums["rows"]
    failures = [(reason, f"{count:,}") for reason, count in sums["failures"].items()]
    if sums["other_failures"]:
        failures.append(("others", f"{sums['other_failures']:,}"))
    return {
        "title": f"{sums['successes']:,} of {sums['rows']:,} rows became a picture ({share:.1f} %)",
        "percent": share,
        "failures": failures,
    }
