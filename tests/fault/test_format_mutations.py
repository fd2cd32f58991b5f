"""Files of every public format, spoiled in seeded ways: told of, or refused in words that name the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.formats import cc3m, img2dataset, refinedweb
from data_pipeline.show import describe, inspect_source, render
from data_pipeline.show.html import render_page
from tests.data_pipeline.formats.test_instructions import talk
from tests.data_pipeline.formats.test_laion import LAION_400M, LAION_COCO, write
from tests.data_pipeline.show.test_html import read
from tests.fault.mutations import BYTES

EACH = 40  # files of each kind spoiled in each way
KINDS = (
    "laion.parquet",
    "coco.parquet",
    "pages.parquet",
    "rows.parquet",
    "a.tsv",
    "a.json",
    "a.jsonl",
    "p.jsonl",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for kind, schema in (("laion", LAION_400M), ("coco", LAION_COCO)):
        usable = {name: (arrow, values[:2] * 20) for name, (arrow, values) in schema.items()}
        write(root / f"{kind}.parquet", usable, compression="snappy" if kind == "laion" else "none")
    documents = [refinedweb.Document(f"text {n} " * 20, f"http://{n}") for n in range(30)]
    refinedweb.write_documents(str(root / "pages.parquet"), documents)
    img2dataset.write_shard(
        str(root / "out"), 0, [img2dataset.Row(f"u{n}", "c", b"x", 4, 4) for n in range(9)]
    )
    (root / "out" / "00000.parquet").rename(root / "rows.parquet")
    cc3m.write_pairs(str(root / "a.tsv"), [(f"caption {n}", f"http://{n}") for n in range(40)])
    records = [talk("human: <image> hi", "gpt: ho é", id=n, image=f"{n}.jpg") for n in range(20)]
    (root / "a.json").write_text(json.dumps(records, indent=1, ensure_ascii=False))
    (root / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    prompts = [{"image": "i.jpg", "prefix": "detect", "suffix": f"<loc{n:04d}> x"} for n in range(20)]
    (root / "p.jsonl").write_text("\n".join(json.dumps(record) for record in prompts))
    for kind in KINDS:
        assert describe(str(root / kind))["problems"] == []
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_file_is_told_of_or_refused(kind: str, whole: Path, tmp_path: Path) -> None:
    data = (whole / kind).read_bytes()
    told = wrong = refused = 0
    for number, spoil in enumerate(BYTES):
        for seed in range(EACH):
            path = tmp_path / kind
            path.write_bytes(spoil(np.random.default_rng([number, seed]), data))
            try:
                found = inspect_source(str(path))
            except UserError as error:
                refused += str(path) in str(error)
                continue
            told += 1
            wrong += bool(found.problems or found.notes)
            json.dumps(found.about).encode()
            render(found.about)
            if seed % 8 == 0:
                read(render_page(found, 4))
    assert told + refused == len(BYTES) * EACH
    assert wrong + refused > told // 4
