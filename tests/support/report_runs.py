"""Handwritten run folders for the tests of reports, and a parser that lists the URLs a browser would fetch."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

VOID = {"meta", "img", "link", "br", "hr", "input"}


class ParsedPage(HTMLParser):
    """Tags, URLs, styles, table cells and text of a page. `unbalanced` lists end tags without a start tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.addresses: list[str] = []
        self.styles: list[str] = []
        self.pieces: list[str] = []
        self.cells: list[list[str]] = []
        self.pictures: list[dict[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attributes}
        url_attributes = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.addresses += [values[name] for name in url_attributes if name in values]
        self.styles += [value for name, value in values.items() if name in ("style", "clip-path", "fill")]
        if tag == "img":
            self.pictures.append(values)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
            return
        self.pieces.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def row(self, *begins: str) -> list[str]:
        """Return the only table row that begins with these cells."""
        found = [row for row in self.cells if row[: len(begins)] == list(begins)]
        assert len(found) == 1, (begins, found)
        return found[0]


def check_self_contained(page: str) -> ParsedPage:
    """Parse the page. Assert that it loads no file, runs no script, and closes every element."""
    parsed = ParsedPage(page)
    assert parsed.unbalanced == []
    assert parsed.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(parsed.tags)
    assert parsed.addresses
    for address in parsed.addresses:
        assert address.startswith(("data:image/png;base64,", "#")), address[:80]
    for style in parsed.styles:
        assert "@import" not in style
        assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", style)), style[
            :80
        ]
    return parsed


def step_row(step: int, losses: dict[str, float], samples: dict[str, int], **more: Any) -> dict[str, Any]:
    """One row of metrics.jsonl for a step of 0.25 s, of which 0.025 s are data wait."""
    total = sum(samples.values())
    times = {"data_wait": 0.025, "step": 0.25, "samples_per_second": total / 0.25}
    row = {
        "step": step,
        "loss": sum(losses.values()),
        **{f"loss/{name}": value for name, value in losses.items()},
    }
    row |= {"lr": 1e-3 * step, "grad_norm": 1 + 1 / step, "samples": samples, "skipped": {}}
    return row | more | {"time": times}


def write_stage(folder: Path, rows: list[dict[str, Any]], figures: dict[str, float] | None) -> None:
    """Write the metrics of a stage, and its result unless `figures` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if figures is not None:
        result = {"step": rows[-1]["step"] if rows else 0, "eval": figures, "seconds": 12.5}
        (folder / "result.json").write_text(json.dumps(result))


def masked_rows(steps: int) -> list[dict[str, Any]]:
    """Rows with a falling loss and a floor of 0.5, evaluated every ten steps."""
    rows = []
    for step in range(1, steps + 1):
        row = step_row(step, {"pairs": 0.6 + 4 * math.exp(-step / 20)}, {"pairs": 64}, loss_floor=0.5)
        if step % 10 == 0:
            row["eval"] = {"zero_shot/digits/top1": 0.1 + 0.8 * step / steps}
        rows.append(row)
    return rows


def write_run(folder: Path, stages: dict[str, Any], name: str = "small") -> Path:
    """Write recipe.yaml, env.json and job.json of a run with these stages."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"run": {"name": name, "dir": str(folder)}, "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    environment = {
        "host": "node7",
        "cores": 2,
        "gpus": [],
        "python": "3.11.7",
        "packages": {"torch": "2.99.1"},
    }
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "job.json").write_text(json.dumps({"on": "local", "nodes": 1, "ranks_per_node": 2}))
    return folder
