"""Run folders written by hand for the tests of reports, and a reader of pages that knows what a browser would fetch."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

VOID = {"meta", "img", "link", "br", "hr", "input"}


class Seen(HTMLParser):
    """Elements, addresses and text of a page; `unbalanced` holds end tags that close nothing."""

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
        given = {name: value or "" for name, value in attributes}
        wanted = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.addresses += [given[name] for name in wanted if name in given]
        self.styles += [value for name, value in given.items() if name in ("style", "clip-path", "fill")]
        if tag == "img":
            self.pictures.append(given)
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
        """The one table row that begins with these cells."""
        found = [row for row in self.cells if row[: len(begins)] == list(begins)]
        assert len(found) == 1, (begins, found)
        return found[0]


def check_alone(page: str) -> Seen:
    """Assert that a browser would fetch nothing for this page, run nothing, and find every element closed."""
    seen = Seen(page)
    assert seen.unbalanced == []
    assert seen.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(seen.tags)
    assert seen.addresses
    for address in seen.addresses:
        assert address.startswith(("data:image/png;base64,", "#")), address[:80]
    for style in seen.styles:
        assert "@import" not in style
        assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", style)), style[
            :80
        ]
    return seen


def step_row(step: int, losses: dict[str, float], samples: dict[str, int], **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl of a step that took a quarter of a second, a tenth of it waiting."""
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
    """A stage's metrics, and its result where there are figures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if figures is not None:
        result = {"step": rows[-1]["step"] if rows else 0, "eval": figures, "seconds": 12.5}
        (folder / "result.json").write_text(json.dumps(result))


def masked_rows(steps: int) -> list[dict[str, Any]]:
    """A falling loss over a floor of 0.5, evaluated every ten steps."""
    rows = []
    for step in range(1, steps + 1):
        row = step_row(step, {"pairs": 0.6 + 4 * math.exp(-step / 20)}, {"pairs": 64}, loss_floor=0.5)
        if step % 10 == 0:
            row["eval"] = {"zero_shot/digits/top1": 0.1 + 0.8 * step / steps}
        rows.append(row)
    return rows


def write_run(folder: Path, stages: dict[str, Any], name: str = "small") -> Path:
    """recipe.yaml, env.json and job.json of a run with these stages."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"run": {"name": name, "dir": str(folder)}, "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    told = {"host": "node7", "cores": 2, "gpus": [], "python": "3.11.7", "packages": {"torch": "2.99.1"}}
    (folder / "env.json").write_text(json.dumps(told))
    (folder / "job.json").write_text(json.dumps({"on": "local", "nodes": 1, "ranks_per_node": 2}))
    return folder
