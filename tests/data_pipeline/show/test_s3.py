"""`data show` reports a source in an object store exactly as it reports the same files on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline import storage
from data_pipeline.formats import cc3m, img2dataset
from data_pipeline.show import describe
from data_pipeline.show.html import write_page
from tests.data_pipeline.formats.test_instructions import talk
from tests.data_pipeline.show.test_records import laion
from tests.support.s3_server import s3_server
from tests.support.samples import encode, pixels


def make(root: Path) -> list[str]:
    """Write sources below `root`; return their paths and patterns, relative to it."""
    rows = [
        img2dataset.Row(f"u{n}", f"c{n}", encode(pixels(0, n)), 24, 20, extension="png") for n in range(4)
    ]
    rows.append(img2dataset.Row("f", "c", None, status="failed_to_resize", error_message="image too small"))
    for shard in range(2):
        img2dataset.write_shard(str(root / "tars"), shard, rows)
    (root / "pairs").mkdir()
    for part in range(2):
        laion(root / "pairs" / f"{part}.parquet", 30)
    cc3m.write_pairs(str(root / "lines" / "a.tsv"), [(f"c{n}", f"http://{n}") for n in range(9)])
    (root / "talks").mkdir()
    (root / "talks" / "i.png").write_bytes(encode(pixels(0, 0)))
    records = [talk("human: <image> hi", "gpt: ho", image="i.png"), talk("human: hi")]
    (root / "talks" / "a.json").write_text(json.dumps(records))
    return ["tars", "tars/{00000..00001}.tar", "pairs", "lines/a.tsv", "talks", "talks/a.json"]


@pytest.mark.integration
def test_the_report_equals_that_of_the_files_on_disk(tmp_path: Path) -> None:
    paths = make(tmp_path / "data")
    with s3_server() as root:
        for file in sorted((tmp_path / "data").rglob("*")):
            if file.is_file():
                storage.publish(f"{root}/{file.relative_to(tmp_path / 'data').as_posix()}", file.read_bytes())
        for path in paths:
            local = json.dumps(describe(str(tmp_path / "data" / path)), sort_keys=True)
            assert json.loads(local)["format"] not in ("unknown-json", "unknown-table")
            remote = json.dumps(describe(f"{root}/{path}"), sort_keys=True)
            assert remote.replace(root, "ROOT") == local.replace(str(tmp_path / "data"), "ROOT")
        for path, pictures in (("tars", 16), ("talks/a.json", 1)):
            write_page(f"{root}/{path}", str(tmp_path / "page.html"))
            assert (tmp_path / "page.html").read_text().count("<img ") == pictures
