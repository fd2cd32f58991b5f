"""A survey as lines for a terminal. No library lays them out: loading one would take longer than all the rest."""

from __future__ import annotations

import textwrap
from typing import Any

COUNTED_BY = {
    "manifest": "the index",
    "stats": "the _stats.json beside each tar",
    "sidecar": "what another tool wrote beside the tars (.idx, .nv-meta or wids)",
    "tar": "the headers of the tars (slow; dromos data index makes it instant)",
    "parquet": "the parquet files",
    "records": "reading every record",
}


def render(about: dict[str, Any], width: int = 100) -> list[tuple[str, str]]:
    """`describe`'s dict as lines of at most `width` characters, each "title", "plain", "note" or "wrong"."""
    lines = [("title", clean(about["path"]))]
    named = facts(about)
    column = max(len(name) for name, _ in named) + 2
    for name, value in named:
        lines += [("plain", line) for line in _hanging(name, value, column, width)]
    if about.get("columns"):
        lines += [("plain", line) for line in ["", *_columns(about["columns"])]]
    if about["first"]:
        what = "text" if about["kind"].endswith("documents") or about["kind"] == "packed text" else "caption"
        what = "turns" if "turns" in about["first"][0] else what
        column = min(max(len(clean(sample["key"])) for sample in about["first"]), width // 2) + 2
        column = max(column, len("sample") + 2)
        lines += [("plain", ""), ("plain", "sample".ljust(column) + what)]
        for sample in about["first"]:
            lines += [("plain", line) for line in _hanging(sample["key"], sample["caption"], column, width)]
    lines += [("note", f"note: {clean(note)}") for note in about["notes"]]
    lines += [("wrong", f"wrong: {clean(problem)}") for problem in about["problems"]]
    for bad in about.get("bad", []):
        lines.append(("wrong", f"  {clean(bad['place'])}: {bad['reason']} {clean(bad['detail'])}".rstrip()))
    return lines


def facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) pairs, in the order in which a person wants them."""
    named = [
        ("kind", about["kind"]),
        ("shards" if "members" in about else "files", f"{about['shards']:,}"),
        ("samples", samples(about)),
        ("size", readable(about["bytes"])),
    ]
    if about["counted_by"]:
        named.append(("counted by", COUNTED_BY[about["counted_by"]]))
    if "members" in about:
        examined = about["examined"]
        listed = ", ".join(f"{name} {count:,}" for name, count in about["members"].items())
        named.append(
            ("members", f"{listed or 'none'} (in {examined['shards']:,} of {about['shards']:,} shards)")
        )
    elif about.get("examined"):
        examined = about["examined"]
        named.append(("examined", f"{examined['samples']:,} records in {examined['shards']:,} files"))
    if about.get("rows"):
        named += rows(about["rows"])
    if about.get("without_pictures"):
        named.append(("text alone", f"{about['without_pictures']:,} records have no picture"))
    named += beside(about)
    return named + [(name, about[name]) for name in ("tokenizer", "fingerprint") if about.get(name)]


def samples(about: dict[str, Any]) -> str:
    if about["samples"] is not None:
        return f"{about['samples']:,}"
    return f"about {about['estimated']:,}, by their mean size" if about.get("estimated") else "unknown"


def rows(sums: dict[str, Any]) -> list[tuple[str, str]]:
    """The story of img2dataset's rows."""
    of = sums["rows"] or 1
    failed = sums["rows"] - sums["successes"]
    told = f"{sums['rows']:,} in the parquet of {sums['shards']:,} shards: {sums['successes']:,} successes"
    told += f" ({100 * sums['successes'] / of:.1f} %), {failed:,} failures"
    if "in_tars" in sums:
        told += f"; {sums['in_tars']:,} samples in the tars"
    named = [("rows", told)]
    if sums["failures"]:
        listed = [f"{reason} {count:,}" for reason, count in sums["failures"].items()]
        if sums["other_failures"]:
            listed.append(f"others {sums['other_failures']:,}")
        named.append(("failures", "; ".join(listed)))
    return named


def beside(about: dict[str, Any]) -> list[tuple[str, str]]:
    """The index where something is to be said of it, the views, other tools' indexes."""
    named = []
    if about.get("index") == "unusable":
        named.append(("index", "there is one, but not of these shards as they are"))
    for view in about.get("views", []):
        kept = "unusable" if view["samples"] is None else f"keeps {view['samples']:,} samples"
        named.append(("view", f"{view['name']}: {kept}" + (f", {view['rule']}" if view["rule"] else "")))
    if about.get("sidecars"):
        named.append(
            ("sidecars", ", ".join(f"{name} {count:,}" for name, count in about["sidecars"].items()))
        )
    return named


def _columns(columns: list[dict[str, Any]]) -> list[str]:
    cells = [("column", "type", "is the", "missing")]
    for column in columns:
        missing = "" if column["missing"] is None else percent(column["missing"])
        cells.append((clean(column["name"]), clean(column["type"])[:40], column["meaning"] or "", missing))
    widths = [max(len(row[i]) for row in cells) + 2 for i in range(4)]
    return [
        "".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]


def percent(part: float) -> str:
    """A share as people read it: never "0.0 %" where there is something."""
    if part in (0, 1):
        return f"{100 * part:.0f} %"
    return f"{100 * part:.1f} %" if part >= 0.001 else f"{100 * part:.1g} %"


def _hanging(name: str, value: str, column: int, width: int) -> list[str]:
    """The value wrapped in a column of its own, behind the name; a long name has a line to itself."""
    name, room = clean(name), max(width - column, 20)
    wrapped = textwrap.wrap(clean(value), room, break_on_hyphens=False) or [""]
    if len(name) + 2 > column:
        return [name, *(" " * column + line for line in wrapped)]
    return [name.ljust(column) + wrapped[0], *(" " * column + line for line in wrapped[1:])]


def clean(text: str) -> str:
    """What a caption or key may not do: move the cursor, colour the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
