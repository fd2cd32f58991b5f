"""Draws docs/architecture.svg from the import tables of tests/test_layout.py: `python -m docs.draw_architecture`.

Each box is a folder or a file of a package, above every box that it may import: all imports point down.
"""

from __future__ import annotations

from functools import cache
from html import escape
from pathlib import Path

from tests.test_layout import MAY_IMPORT

OUT = Path(__file__).with_name("architecture.svg")
PACKAGES = {
    "launch": "from a command to running ranks",
    "pretrain": "recipes, models, training, evaluation, merging",
    "data_pipeline": "from bytes on a disk or in S3 to collated batches",
}
BOXES = {
    "launch/cli": "the dromos command",
    "launch/demo": "make demo",
    "launch/run": "recipe and flags to a job",
    "launch/local": "ranks on this machine",
    "launch/slurm": "sbatch script, job steps",
    "launch/ray": "Ray job, rank actors",
    "launch/supervise": "watch and stop ranks",
    "launch/preflight": "checks before any write",
    "launch/run_folder": "files before the first stage",
    "launch/data_check": "can sources be read",
    "launch/stage_state": "which stages are done",
    "launch/status": "state of a run folder",
    "pretrain/train": "one stage on one rank",
    "pretrain/merge_stage": "a merge in a recipe",
    "pretrain/evaluate": "held-out figures",
    "pretrain/export": "open_clip, transformers",
    "pretrain/build": "stage to live objects",
    "pretrain/objectives": "batch to losses",
    "pretrain/merge": "interpolate checkpoints",
    "pretrain/models": "nn.Modules, patch masks",
    "pretrain/weights": "read any checkpoint",
    "pretrain/report": "run folder to HTML",
    "pretrain/losses": "contrastive, next token",
    "pretrain/run": "run folder, addresses",
    "pretrain/distributed": "DeepSpeed, collectives",
    "pretrain/recipe": "typed YAML, no torch",
    "data_pipeline/stream": "the public loader",
    "data_pipeline/loader": "a rank's batches, prefetch",
    "data_pipeline/workers": "threads, processes, Ray",
    "data_pipeline/batches": "samples to batches",
    "data_pipeline/formats": "public dataset formats",
    "data_pipeline/index": "dromos data index",
    "data_pipeline/show": "dromos data show",
    "data_pipeline/prepare": "offline dataset jobs",
    "data_pipeline/sources": "manifest, offsets, tars",
    "data_pipeline/order": "(step, row) to sample",
    "data_pipeline/transforms": "decode, crop, tokenize",
    "data_pipeline/storage": "disk, S3, node cache",
}
WIDTH, BOX, HEIGHT, GAP, PAD, HEAD = 1000, 176, 46, 14, 20, 40
COLOURS = {
    "launch": ("#fbe9d7", "#b4631f"),
    "pretrain": ("#e3ecf9", "#2d5c9e"),
    "data_pipeline": ("#e2f1e6", "#2c7a48"),
}


def layers(package: str) -> list[list[str]]:
    """Folders and files of a package from the top layer down; each layer imports only from layers below it."""
    table = {left: right.split() for left, right in MAY_IMPORT[package].items() if left != "*"}

    @cache
    def level(name: str) -> int:
        return 1 + max((level(below) for below in table.get(name, ())), default=-1)

    drawn = [path.partition("/")[2] for path in BOXES if path.startswith(package + "/")]
    found: dict[int, list[str]] = {}
    for name in drawn:
        found.setdefault(level(name), []).append(name)
    return [found[number] for number in sorted(found, reverse=True)]


def draw() -> str:
    """The picture as SVG."""
    parts, top = [], PAD
    for package, what in PACKAGES.items():
        rows = layers(package)
        height = HEAD + len(rows) * (HEIGHT + GAP) + 4
        fill, ink = COLOURS[package]
        parts.append(
            f'<rect x="{PAD}" y="{top}" width="{WIDTH - 2 * PAD}" height="{height}" rx="10" fill="{fill}"/>'
        )
        parts.append(
            f'<text x="{PAD + 16}" y="{top + 26}" fill="{ink}" font-size="17" font-weight="bold">{package}/'
            f'<tspan font-weight="normal" font-size="14">  {what}</tspan></text>'
        )
        for number, row in enumerate(rows):
            y = top + HEAD + number * (HEIGHT + GAP)
            x = (WIDTH - len(row) * BOX - (len(row) - 1) * GAP) / 2
            for name in row:
                parts += box(x, y, name, BOXES[f"{package}/{name}"], ink)
                x += BOX + GAP
        top += height + 34
        if package != "data_pipeline":
            parts.append(
                f'<path d="M{WIDTH / 2} {top - 32} v22 m-6 -8 l6 8 l6 -8" fill="none" stroke="#555" stroke-width="2"/>'
                f'<text x="{WIDTH / 2 + 14}" y="{top - 14}" fill="#555" font-size="13">may import</text>'
            )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - 14}" font-family="sans-serif">'
    )
    background = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return (
        "\n".join([head, "<title>The three packages of Dromos</title>", background, *parts, "</svg>"]) + "\n"
    )


def box(x: float, y: float, name: str, what: str, ink: str) -> list[str]:
    middle = x + BOX / 2
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{BOX}" height="{HEIGHT}" rx="6" fill="#ffffff" stroke="{ink}"/>',
        f'<text x="{middle:g}" y="{y + 19:g}" text-anchor="middle" fill="#1d1d1d" font-size="14" '
        f'font-weight="bold">{escape(name)}</text>',
        f'<text x="{middle:g}" y="{y + 36:g}" text-anchor="middle" fill="#444" font-size="12">{escape(what)}</text>',
    ]


if __name__ == "__main__":
    OUT.write_text(draw())
