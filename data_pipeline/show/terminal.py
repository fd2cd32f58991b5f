"""The report on a source as terminal lines. No layout library: loading one would take longer than everything else."""

from __future__ import annotations

import textwrap
from typing import Any

COUNTED_BY = {
    "manifest": "the index",
    "stats": "the _stats.json beside each tar",
    "sidecar": "index files of another tool beside the tars (.idx, .nv-meta or wids)",
    "tar": "the headers of the tars (slow; an index by dromos data index makes it fast)",
    "parquet": "the parquet files",
    "records": "reading every record",
}


def render(about: dict[str, Any], width: int = 100) -> list[tuple[str, str]]:
    """Return the dict of `describe` as (kind, line); kind is "title", "plain", "note" or "problem".

    Facts and samples are wrapped at `width` characters.
    """
    lines = [("title", printable(about["path"]))]
    named = facts(about)
    column = max(len(name) for name, _ in named) + 2
    for name, value in named:
        lines += [("plain", line) for line in _hanging(name, value, column, width)]
    if about.get("columns"):
        lines += [("plain", line) for line in ["", *_columns(about["columns"])]]
    if about["first"]:
        is_text = about["kind"].endswith("documents") or about["kind"] == "packed text"
        heading = "turns" if "turns" in about["first"][0] else "text" if is_text else "caption"
        column = min(max(len(printable(sample["key"])) for sample in about["first"]), width // 2) + 2
        column = max(column, len("sample") + 2)
        lines += [("plain", ""), ("plain", "sample".ljust(column) + heading)]
        for sample in about["first"]:
            lines += [("plain", line) for line in _hanging(sample["key"], sample["caption"], column, width)]
    lines += [("note", f"note: {printable(note)}") for note in about["notes"]]
    lines += [("problem", f"problem: {printable(problem)}") for problem in about["problems"]]
    for bad in about.get("bad", []):
        line = f"  {printable(bad['place'])}: {bad['reason']} {printable(bad['detail'])}"
        lines.append(("problem", line.rstrip()))
    return lines


def facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) pairs, the most important first."""
    named = [
        ("kind", about["kind"]),
        ("shards" if "members" in about else "files", f"{about['shards']:,}"),
        ("samples", sample_count(about)),
        ("size", format_bytes(about["bytes"])),
    ]
    if about["counted_by"]:
        named.append(("counted by", COUNTED_BY[about["counted_by"]]))
    if "members" in about:
        examined = about["examined"]
        listed = ", ".join(f"{name} {count:,}" for name, count in about["members"].items())
        listed += f" and {about['other_members']:,} more" if about.get("other_members") else ""
        named.append(
            ("members", f"{listed or 'none'} (in {examined['shards']:,} of {about['shards']:,} shards)")
        )
    elif about.get("examined"):
        examined = about["examined"]
        named.append(("examined", f"{examined['samples']:,} records in {examined['shards']:,} files"))
    if about.get("rows"):
        named += _row_facts(about["rows"])
    if about.get("without_pictures"):
        named.append(("text only", f"{about['without_pictures']:,} records have no image"))
    named += _facts_beside_tars(about)
    return named + [(name, about[name]) for name in ("tokenizer", "fingerprint") if about.get(name)]


def sample_count(about: dict[str, Any]) -> str:
    if about["samples"] is not None:
        return f"{about['samples']:,}"
    return f"about {about['estimated']:,}, by their mean size" if about.get("estimated") else "unknown"


def _row_facts(sums: dict[str, Any]) -> list[tuple[str, str]]:
    """Successes and failures of img2dataset's downloads."""
    total = sums["rows"] or 1
    failed = sums["rows"] - sums["successes"]
    text = f"{sums['rows']:,} in the parquet of {sums['shards']:,} shards: {sums['successes']:,} successes"
    text += f" ({100 * sums['successes'] / total:.1f} %), {failed:,} failures"
    if "in_tars" in sums:
        text += f"; {sums['in_tars']:,} samples in the tars"
    named = [("rows", text)]
    if sums["failures"]:
        listed = [f"{reason} {count:,}" for reason, count in sums["failures"].items()]
        if sums["other_failures"]:
            listed.append(f"others {sums['other_failures']:,}")
        named.append(("failures", "; ".join(listed)))
    return named


def _facts_beside_tars(about: dict[str, Any]) -> list[tuple[str, str]]:
    """An unusable index, the views, and the index files of other tools."""
    named = []
    if about.get("index") == "unusable":
        named.append(("index", "exists, but does not match the shards as they are now"))
    for view in about.get("views", []):
        kept = "unusable" if view["samples"] is None else f"keeps {view['samples']:,} samples"
        named.append(("view", f"{view['name']}: {kept}" + (f", {view['rule']}" if view["rule"] else "")))
    if about.get("sidecars"):
        named.append(
            ("sidecars", ", ".join(f"{name} {count:,}" for name, count in about["sidecars"].items()))
        )
    return named


def _columns(columns: list[dict[str, Any]]) -> list[str]:
    cells = [("column", "type", "meaning", "missing")]
    for column in columns:
        missing = "" if column["missing"] is None else format_percent(column["missing"])
        cells.append(
            (printable(column["name"]), printable(column["type"])[:40], column["meaning"] or "", missing)
        )
    widths = [max(len(row[i]) for row in cells) + 2 for i in range(4)]
    return [
        "".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]


def _hanging(name: str, value: str, column: int, width: int) -> list[str]:
    """Wrap the value in its own column, to the right of the name. A name wider than its column gets its own line."""
    name, room = printable(name), max(width - column, 20)
    wrapped = textwrap.wrap(printable(value), room, break_on_hyphens=False) or [""]
    if len(name) + 2 > column:
        return [name, *(" " * column + line for line in wrapped)]
    return [name.ljust(column) + wrapped[0], *(" " * column + line for line in wrapped[1:])]


def printable(text: str) -> str:
    """Replace control characters by spaces: a caption or key must not move the cursor or colour the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def format_percent(share: float) -> str:
    """Format a share in percent. A small share that is not 0 never becomes "0.0 %"."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1g} %"


def format_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
