"""`dromos data show` on tables, lines and conversations, and on img2dataset's tars compared with its parquet."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from data_pipeline.formats import cc3m, img2dataset
from data_pipeline.index.build import build_index
from data_pipeline.index.build_view import Rule, build_view
from data_pipeline.show import describe, render
from tests.data_pipeline.formats.test_instructions import talk
from tests.data_pipeline.formats.test_laion import LAION_2B, write
from tests.support.samples import encode, pixels, write_source

PICTURE = encode(pixels(0, 0, 4, 4), "JPEG")


def shown(about: dict[str, Any]) -> str:
    json.dumps(about)
    return "\n".join(line for _, line in render(about, 140))


def laion(path: Path, rows: int, **changes: pa.Array) -> str:
    numbers = np.arange(rows)
    columns: dict[str, Any] = {
        "URL": [f"http://a/{n}" for n in numbers],
        "TEXT": [f"caption {n}" for n in numbers],
        "WIDTH": pa.array(numbers + 10, pa.int32()),
        "HEIGHT": pa.array(numbers + 20, pa.int32()),
        "similarity": numbers / rows,
        "hash": numbers,
        "punsafe": pa.array(numbers / rows, pa.float32()),
        "pwatermark": pa.array(numbers / rows, pa.float32()),
    }
    parquet.write_table(pa.table(columns | changes), path)
    return str(path)


def test_a_table_of_pictures(tmp_path: Path) -> None:
    for part in range(3):
        laion(tmp_path / f"part-{part}.parquet", 200)
    about = describe(str(tmp_path), first=2)
    assert (about["format"], about["kind"]) == ("laion-2b", "LAION-2B (Re-LAION) metadata, joined")
    assert (about["shards"], about["samples"], about["examined"]["samples"]) == (3, 600, 600)
    assert about["problems"] == []
    assert about["first"][1] == {"key": "http://a/1", "caption": "caption 1"}
    assert {c["name"]: c["meaning"] for c in about["columns"]} == {
        "URL": "url", "TEXT": "caption", "WIDTH": "width", "HEIGHT": "height", "similarity": "similarity",
        "hash": "hash", "punsafe": "punsafe", "pwatermark": "pwatermark",
    }  # fmt: skip
    assert about["notes"] == ["400 of 600 (66.7 %) records examined repeat a URL"]
    assert "WIDTH" in shown(about)


def test_shares_of_what_is_missing(tmp_path: Path) -> None:
    texts = [None if n % 4 == 0 else "  " if n % 4 == 1 else "words" for n in range(200)]
    widths = pa.array([None if n % 10 == 0 else float("nan") if n % 10 == 1 else 7.0 for n in range(200)])
    urls = ["" if n == 3 else f"http://{n}" for n in range(200)]
    about = describe(
        laion(tmp_path / "a.parquet", 200, TEXT=pa.array(texts), WIDTH=widths, URL=pa.array(urls))
    )
    missing = {column["meaning"]: column["missing"] for column in about["columns"]}
    # Row 3 has no URL, so it is a bad record and not counted; all other rows are pairs.
    assert missing["caption"] == pytest.approx(100 / 199)
    assert missing["width"] == pytest.approx(40 / 199)
    assert missing["url"] == pytest.approx(1 / 200)
    assert missing["height"] == 0
    assert about["problems"] == []  # 0.5 % is below TOLERATED_SHARE
    assert about["verdicts"] == {"missing url": 1}
    assert any("100 of 199 (50.3 %) records examined have no caption" in note for note in about["notes"])
    assert "50.3 %" in shown(about)


def test_many_bad_rows_are_a_problem(tmp_path: Path) -> None:
    urls = pa.array([None if n < 20 else f"http://{n}" for n in range(200)])
    about = describe(laion(tmp_path / "a.parquet", 200, URL=urls))
    (problem,) = about["problems"]
    assert "20 of 200 (10.0 %) records examined are unusable: missing url 20; the first is row 0" in problem
    assert [bad["place"] for bad in about["bad"]] == ["row 0", "row 1", "row 2"]
    empty = pa.array([""] * 200)
    (problem,) = describe(laion(tmp_path / "a.parquet", 200, TEXT=empty))["problems"]
    assert "none of 200 records examined has a caption" in problem


def test_wrong_types_columns_and_files_are_named(tmp_path: Path) -> None:
    width = pa.array(["10"] * 50)
    laion(tmp_path / "a.parquet", 50, WIDTH=width)
    laion(tmp_path / "b.parquet", 50, extra=pa.array([1] * 50))
    whole = Path(laion(tmp_path / "c.parquet", 50))
    whole.write_bytes(whole.read_bytes()[:-30])
    about = describe(str(tmp_path))
    assert "column WIDTH has type string, the width should be numbers" in about["problems"]
    assert any("c.parquet is not a parquet file, or cut off" in problem for problem in about["problems"])
    assert any("b.parquet has other columns than the first file: extra" in note for note in about["notes"])
    assert about["samples"] is None


def test_rows_of_very_many_files_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(30):
        laion(tmp_path / f"{part:02d}.parquet", 90 + part % 3)
    assert describe(str(tmp_path))["samples"] == 30 * 91
    monkeypatch.setattr("data_pipeline.show.records.COUNTED_FILES", 10)
    about = describe(str(tmp_path))
    assert about["samples"] is None
    assert about["estimated"] == pytest.approx(30 * 91, rel=0.03)


def test_missing_files_of_a_pattern_are_named(tmp_path: Path) -> None:
    laion(tmp_path / "1.parquet", 5)
    about = describe(str(tmp_path / "{0..2}.parquet"))
    assert (about["format"], about["samples"]) == ("laion-2b", 5)
    assert about["problems"] == [f"{tmp_path}/{n}.parquet does not exist" for n in (0, 2)]


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    (problem,) = describe(
        write(tmp_path / "a.parquet", {"URL": LAION_2B["URL"], "CAPTIONS": LAION_2B["TEXT"]})
    )["problems"]
    assert "perhaps 'CAPTIONS' is the caption; rename it to text" in problem
    about = describe(write(tmp_path / "b.parquet", {"IMAGE_LINK": LAION_2B["URL"], "x": LAION_2B["hash"]}))
    assert about["format"] == "unknown-table"
    assert "not a table of a known format" in about["problems"][0]
    assert "IMAGE_LINK" in about["problems"][0]
    assert [column["name"] for column in about["columns"]] == ["IMAGE_LINK", "x"]
    (tmp_path / "c.json").write_text('[{"conversation": []}]')
    about = describe(str(tmp_path / "c.json"))
    assert "perhaps 'conversation' is one of them" in about["problems"][0]


def test_lines(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tsv")
    cc3m.write_pairs(path, [(f"caption {n}", f"http://{n}") for n in range(300)])
    about = describe(path, first=1)
    assert (about["format"], about["samples"], about["counted_by"], about["problems"]) == (
        "cc3m",
        300,
        "records",
        [],
    )
    assert about["first"] == [{"key": "http://0", "caption": "caption 0"}]
    with open(path, "ab") as file:
        file.write(b"no tab\n\xff\t\n" * 10)
    about = describe(path)
    assert about["verdicts"] == {"no tab": 10, "not UTF-8": 10}
    assert "20 of 320 (6.2 %) records examined are unusable" in about["problems"][0]
    assert "line 301: no tab" in shown(about)
    cc3m.write_pairs(path, [(f"http://{n}", f"caption {n}") for n in range(30)])
    assert "swap the columns" in describe(path)["problems"][0]


def test_the_number_of_lines_of_a_large_file_is_estimated(tmp_path: Path) -> None:
    path = str(tmp_path / "a.tsv")
    cc3m.write_pairs(path, [(f"caption {n:06d}", f"http://{n:06d}") for n in range(20_000)])
    about = describe(path)
    assert about["samples"] is None
    assert about["estimated"] == pytest.approx(20_000, rel=0.01)
    assert "about 20,0" in shown(about)


def test_conversations(tmp_path: Path) -> None:
    records = [talk("human: <image> hi", "gpt: ho", id=n, image=f"{n}.jpg") for n in range(4)]
    records += [talk("human: hi", "gpt: ho", id=0)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(b"")
    about = describe(str(tmp_path / "a.json"))
    assert (about["format"], about["samples"], about["without_pictures"]) == ("llava", 5, 1)
    assert about["problems"] == []
    assert about["notes"] == ["1 of 5 (20.0 %) records examined repeat an id"]
    assert about["first"][0]["turns"] == [
        {"role": "user", "text": "<image> hi"},
        {"role": "assistant", "text": "ho"},
    ]
    (tmp_path / "2.jpg").unlink()
    assert "1 of 4 (25.0 %) images checked are not in" in describe(str(tmp_path / "a.json"))["problems"][0]
    (tmp_path / "images").mkdir()
    about = describe(str(tmp_path / "a.json"), images=str(tmp_path / "images"))
    assert "4 of 4 (100 %) images checked are not in" in about["problems"][0]
    (tmp_path / "a.json").write_text(
        json.dumps([*records, talk("human: hi"), talk("human: x", "gpt: y", image="/x")])
    )
    (problem,) = [p for p in describe(str(tmp_path / "a.json"))["problems"] if "are unusable" in p]
    assert "no answer 1, unsafe image path 1; the first is entry 5" in problem


def test_prompts(tmp_path: Path) -> None:
    lines = [{"image": "x.jpg", "prefix": "caption", "suffix": "s"}, {"image": "x.jpg", "prefix": "caption"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    about = describe(str(tmp_path / "a.jsonl"))
    assert (about["format"], about["samples"], about["problems"]) == ("paligemma", 2, [])
    assert "1 of 2 (50.0 %) records examined have no suffix" in about["notes"][0]
    assert "Give their folder with --images" in about["notes"][1]
    (tmp_path / "a.jsonl").write_text("")
    assert "JSON of no known format" in describe(str(tmp_path / "a.jsonl"))["kind"]


def rows(count: int, failed: int = 0) -> list[img2dataset.Row]:
    good = [img2dataset.Row(f"u{n}", f"caption {n}", PICTURE, 4, 4) for n in range(count)]
    reasons = ["HTTP Error 404: Not Found", "image too small"]
    bad = [
        img2dataset.Row(f"f{n}", "c", None, status=img2dataset.FAILURES[n % 2], error_message=reasons[n % 2])
        for n in range(failed)
    ]
    return good + bad


def test_img2dataset_tars_are_compared_with_their_parquet(tmp_path: Path) -> None:
    img2dataset.write_shard(str(tmp_path), 0, rows(5, 3))
    img2dataset.write_shard(str(tmp_path), 1, rows(4, 2))
    about = describe(str(tmp_path))
    assert about["kind"] == "img2dataset"
    assert about["problems"] == about["notes"] == []
    assert about["rows"] == {
        "shards": 2,
        "rows": 14,
        "successes": 9,
        "failures": {
            "failed_to_download: HTTP Error 404: Not Found": 3,
            "failed_to_resize: image too small": 2,
        },
        "other_failures": 0,
        "in_tars": 9,
    }
    text = shown(about)
    assert "14 in the parquet of 2 shards: 9 successes (64.3 %), 5 failures; 9 samples in the tars" in text
    assert "failed_to_download: HTTP Error 404: Not Found 3; failed_to_resize: image too small 2" in text


def test_a_tar_that_does_not_agree_with_its_parquet(tmp_path: Path) -> None:
    for shard in range(3):
        img2dataset.write_shard(str(tmp_path), shard, rows(5))
    img2dataset.write_shard(str(tmp_path / "other"), 0, rows(3))
    (tmp_path / "other/00000.parquet").rename(tmp_path / "00000.parquet")
    (tmp_path / "00001.parquet").write_bytes(b"PAR1 and nothing")
    (tmp_path / "00002.parquet").unlink()
    about = describe(str(tmp_path))
    (extra,) = [p for p in about["problems"] if "does not list as a success" in p]
    assert "00000.tar holds 2 samples" in extra
    assert any("00001.parquet is not a parquet file, or cut off" in problem for problem in about["problems"])
    assert any("1 of 3 (33.3 %) tars examined have no parquet file" in note for note in about["notes"])
    # The reverse: successes of the parquet file that are not in the tar.
    img2dataset.write_shard(str(tmp_path / "more"), 0, rows(7))
    (tmp_path / "more/00000.parquet").rename(tmp_path / "00000.parquet")
    (lost,) = [p for p in describe(str(tmp_path))["problems"] if "are not in" in p]
    assert "lists 7 successes, but 2 of them are not in" in lost


def test_a_second_run_beside_the_first_repeats_its_keys(tmp_path: Path) -> None:
    for name in ("00000", "10000"):
        img2dataset.write_shard(str(tmp_path / name), 0, rows(3))
        for file in (tmp_path / name).iterdir():
            file.rename(tmp_path / file.name.replace("00000", name, 1))
        (tmp_path / name).rmdir()
    about = describe(str(tmp_path))
    assert about["problems"] == []
    assert any("3 of 6 (50.0 %) samples examined repeat a key: 000000000" in n for n in about["notes"])
    assert any(
        "key 000000000 does not belong to shard 10000; perhaps the tar was renamed" in n
        for n in about["notes"]
    )


def test_members_of_a_sample_that_are_not_adjacent_are_noted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "b.txt", "a.txt"):
            tar.addfile(tarfile.TarInfo(name))
    about = describe(str(tmp_path))
    assert any("two samples with the key a that are not adjacent" in note for note in about["notes"])


def test_six_digits_and_other_pictures_are_fine_and_a_null_caption_is_told(tmp_path: Path) -> None:
    kinds = [img2dataset.Row("u", "c" if n else None, PICTURE, 4, 4, extension=kind)
             for n, kind in enumerate(("jpg", "jpeg", "png", "webp"))]  # fmt: skip
    img2dataset.write_shard(str(tmp_path), 12, kinds, digits=6)
    about = describe(str(tmp_path))
    assert (about["kind"], about["verdicts"], about["notes"]) == ("img2dataset", {"missing caption": 1}, [])
    (problem,) = about["problems"]
    assert (
        "1 of 4 (25.0 %) samples decoded are unusable: missing caption 1; the first is 0000120000" in problem
    )
    assert about["members"] == {"jpeg": 1, "jpg": 1, "json": 4, "png": 1, "txt": 3, "webp": 1}


def test_control_characters_of_records_do_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;x\x07\x1b[31m\r\n"
    (tmp_path / "a.json").write_text(
        json.dumps([talk(f"human: {evil}", f"gpt: {evil}", id=evil), talk(f"{evil}: x")])
    )
    about = describe(str(tmp_path / "a.json"))
    for _, line in render(about, 100):
        assert all(letter.isprintable() for letter in line), repr(line)


def test_the_index_views_and_sidecars_beside_a_source(tmp_path: Path) -> None:
    img2dataset.write_shard(str(tmp_path), 0, rows(6))
    about = describe(str(tmp_path))
    assert (about["index"], about["views"], about["sidecars"]) == ("none", [], {})
    build_index(str(tmp_path))
    build_view(str(tmp_path), "some", Rule(where="caption != 'caption 3'"))
    (tmp_path / "00000.tar.idx").write_bytes(bytes(8 * 7))
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / ".info.json").write_text("{}")
    about = describe(str(tmp_path))
    assert (about["index"], about["samples"], about["problems"]) == ("in use", 6, [])
    assert about["views"] == [{"name": "some", "rule": "caption != 'caption 3'", "samples": 5}]
    assert about["sidecars"] == {".tar.idx": 1, ".nv-meta/.info.json": 1}
    assert "some: keeps 5 samples, caption != 'caption 3'" in shown(about)
    img2dataset.write_shard(str(tmp_path), 0, rows(16))
    about = describe(str(tmp_path))
    assert about["index"] == "unusable"
    assert any("when it was indexed" in problem for problem in about["problems"])


def test_sidecars_of_other_tools_are_named_and_damaged_ones_are_a_note(tmp_path: Path) -> None:
    write_source(tmp_path, [6])
    (tmp_path / "00000.tar.idx").write_bytes(bytes(8 * 7))
    about = describe(str(tmp_path))
    assert (about["counted_by"], about["samples"], about["problems"]) == ("sidecar", 6, [])
    assert "index files of another tool beside the tars" in shown(about)
    (tmp_path / "00000.tar.idx").write_text("not one")
    about = describe(str(tmp_path))
    assert (about["counted_by"], about["samples"], about["problems"]) == ("tar", 6, [])
    assert any("it is neither an index of DALI nor of Energon" in note for note in about["notes"])
