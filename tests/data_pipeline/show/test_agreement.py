"""`data show` in every form gives the verdict of training on each sample, and one exit code."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.batches.row_builder import RowBuilder
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import ContentError, UserError
from data_pipeline.show import describe
from data_pipeline.show.html import write_page
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.tar import TarWriter
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.transforms.text_formats import PackedFormat, TextSpec
from data_pipeline.transforms.tokenizers import load_tokenizer
from tests.launch.cli.test_app import dromos
from tests.support.samples import encode, pixels, write_packed

PNG = encode(pixels(0, 0))
JPEG = encode(pixels(0, 1), "JPEG")
HTML = b"<!DOCTYPE html><html>gone</html>"


def as_json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


# Members of a sample -> the reason of its verdict, None if it is usable. The first four are public reports:
# clip-retrieval PR #98, open_clip PR #1183, img2dataset's answer pages, an empty txt of img2dataset.
SAMPLES: dict[str, tuple[dict[str, bytes], str | None]] = {
    "list of captions": ({"jpg": JPEG, "json": as_json(captions=["a dot", "another dot"])}, None),
    "caption in another field": ({"jpg": JPEG, "json": as_json(text="a dot", url="u")}, "missing caption"),
    "a page as picture": ({"jpg": HTML, "txt": b"a dot"}, "undecodable"),
    "blank txt, good json": ({"jpg": JPEG, "txt": b" \n", "json": as_json(caption="a dot")}, None),
    "blank txt, bad json": ({"jpg": JPEG, "txt": b"", "json": b"{"}, "bad json"),
    "good txt, bad json": ({"png": PNG, "txt": b"a dot", "json": b"{"}, None),
    "list of blanks": ({"png": PNG, "json": as_json(captions=["", None], top_caption="a dot")}, None),
    "a number as caption": ({"png": PNG, "json": as_json(caption=7)}, "missing caption"),
    "cp1252": ({"png": PNG, "txt": "é".encode("cp1252")}, "not UTF-8"),
    "utf-16": ({"png": PNG, "txt": "é".encode("utf-16")}, None),
    "nul in json": ({"png": PNG, "json": as_json(caption="a\0")}, "NUL in text"),
    "cut off": ({"png": PNG[:-30], "txt": b"a dot"}, "undecodable"),
    "empty": ({"jpg": b"", "txt": b"a dot"}, "undecodable"),
    "bomb": ({"png": encode(Image.new("1", (6000, 6000))), "txt": b"a dot"}, "too many pixels"),
    "no picture": ({"txt": b"a dot"}, "missing image"),
    "no caption": ({"png": PNG}, "missing caption"),
    "terminal": ({"png": PNG, "txt": "\x1b[31m\x9b2J a\tdot\r".encode()}, None),
}


def write(folder: Path, samples: Mapping[str, dict[str, bytes]]) -> str:
    folder.mkdir()
    with TarWriter(folder / "00000.tar") as tar:
        for key, members in samples.items():
            tar.write(key, members)
    return str(folder)


def trained(path: str) -> dict[str, str]:
    """Key -> reason of the samples that training would replace."""
    spec = StreamSpec(
        "pairs", 0, {"s": SourceSpec(path)}, batch=1, image=ImageSpec(16), text=TextSpec("clip-bpe", 16)
    )
    manifest = open_source("s", path)
    rows = RowBuilder(spec, {"s": manifest}, load_tokenizer("clip-bpe"))
    reasons = {}
    for index in range(manifest.samples):
        try:
            rows.make("s", 0, index, None, np.empty((1, 16, 16, 3), np.uint8))
        except ContentError as error:
            reasons[rows.key_of("s", 0, index)] = error.reason
    return reasons


@pytest.mark.parametrize("name", SAMPLES)
def test_one_verdict_in_training_and_in_every_form(name: str, tmp_path: Path) -> None:
    members, reason = SAMPLES[name]
    path = write(tmp_path / "s", {"k": members})
    assert trained(path) == ({} if reason is None else {"k": reason})
    plain = describe(path)
    assert plain.get("verdicts", {}) == ({} if reason is None else {reason: 1})
    assert bool(plain["problems"]) == (reason is not None)
    page = write_page(path, str(tmp_path / "page.html")).about
    assert (page["problems"], page["notes"], page.get("verdicts")) == (
        plain["problems"], plain["notes"], plain.get("verdicts"),
    )  # fmt: skip


def test_verdicts_are_counted_by_reason_and_the_exit_codes_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "s", {f"k{n}": members for n, (members, _) in enumerate(SAMPLES.values())})
    counted = Counter(reason for _, reason in SAMPLES.values() if reason is not None)
    assert Counter(trained(path).values()) == counted
    forms = [["--json"], [], ["--html", str(tmp_path / "page.html")]]
    shown = [dromos("data", "show", path, *form) for form in forms]
    assert [result.exit_code for result in shown] == [2, 2, 2]
    (about,) = json.loads(shown[0].stdout)
    assert about["verdicts"] == dict(counted)
    problem = about["problems"][-1]
    assert f"{counted.total()} of {len(SAMPLES)}" in problem
    assert "Training replaces such samples; write them again" in problem
    for result in shown[1:]:
        assert problem in result.stdout
    for result in shown:
        assert all(letter.isprintable() or letter == "\n" for letter in result.stdout)
    good = write(
        tmp_path / "good", {f"k{n}": m for n, (m, reason) in enumerate(SAMPLES.values()) if not reason}
    )
    assert [dromos("data", "show", good, *form).exit_code for form in forms] == [0, 0, 0]


@pytest.mark.parametrize("first_bad", [range(1), range(7, 8), range(350, 700)])
def test_the_first_samples_and_others_of_many_are_decoded(first_bad: range, tmp_path: Path) -> None:
    good, bad = {"jpg": JPEG, "txt": b"a dot"}, {"jpg": HTML, "txt": b"a dot"}
    path = write(tmp_path / "s", {f"{n:04d}": bad if n in first_bad else good for n in range(700)})
    found = describe(path)["verdicts"]["undecodable"]
    assert found == 1 if len(first_bad) == 1 else 100 < found < 140


def test_large_samples_are_decoded_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    picture = JPEG + bytes(3 << 20)
    samples = {f"{n:04d}": {"jpg": picture, "txt": b"a dot"} for n in range(40)}
    page = write_page(write(tmp_path / "s", samples), str(tmp_path / "page.html"))
    assert page.problems == []
    assert page.decoded is not None
    assert 8 <= page.decoded.examined <= 30  # 64 MiB


def test_a_source_that_a_run_refuses_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "s", {f"{n:04d}": {"jpg": HTML, "txt": b"x"} for n in range(10)})
    spec = StreamSpec("pairs", 0, {"s": SourceSpec(path)}, batch=1, image=ImageSpec(16))
    with pytest.raises(UserError, match="all 8 samples that were tried are unusable"):
        RowBuilder(spec, {"s": open_source("s", path)}, None).check("s")
    assert "10 of 10 (100 %) samples decoded are unusable: undecodable 10" in describe(path)["problems"][0]
    assert "Training on this source would stop" in describe(path)["problems"][0]


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("member", "text"),
    [
        (npy(np.zeros(7, np.uint16)), "7 tokens, but text.length is 8"),
        (npy(np.zeros(8, np.int64)), "int64"),
        (b"\x93NUMPY", "undecodable 1"),
        (npy(np.zeros(8, np.uint16))[:-3], "undecodable 1"),
    ],
)
def test_packed_text_is_read_as_in_training(member: bytes, text: str, tmp_path: Path) -> None:
    write_packed(tmp_path / "s", [12], 8)
    assert describe(str(tmp_path / "s"))["problems"] == []
    (tmp_path / "t").mkdir()
    with TarWriter(tmp_path / "t" / "0.tar") as tar:
        for n in range(5):
            tar.write(str(n), {"npy": member if n == 3 else npy(np.zeros(8, np.uint16))})
    spec = StreamSpec("text", 0, {"s": SourceSpec(str(tmp_path / "t"))}, batch=1, text=PackedFormat(8))
    rows = RowBuilder(spec, {"s": open_source("s", str(tmp_path / "t"))}, None)
    with pytest.raises((ContentError, UserError)):
        rows.make("s", 0, 3, None, None)
    (problem,) = describe(str(tmp_path / "t"))["problems"]
    assert text in problem
