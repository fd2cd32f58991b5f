"""The HTML page of `data show`: self-contained and escaped, with the crops and problems that training would have."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import ContentError
from data_pipeline.formats import img2dataset, refinedweb
from data_pipeline.show import charts, inspect_source
from data_pipeline.show.html import build_page, write_page
from data_pipeline.show.samples import decode_picture, location_boxes
from data_pipeline.sources.tar import TarWriter
from data_pipeline.transforms.decode import ImageSpec
from tests.data_pipeline.formats.test_instructions import talk
from tests.data_pipeline.show.test_records import laion
from tests.launch.cli.test_app import dromos
from tests.support.samples import encode, pixels, write_packed, write_source

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; {{ 7*7 }} \x1b[31m"
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and asserts that tags are properly nested."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def visible_text(self) -> str:
        return " ".join(" ".join(self.text).split())


def read(html: str) -> Reader:
    """Parse the page, and check what holds for every page: it loads no file and runs no script."""
    found = Reader(html)
    assert found.open == []
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith(("data:image/jpeg;base64,", "data:image/png;base64,", "#")), value
        if name == "style":
            assert re.fullmatch(r"[-a-z0-9:;.% ]*", value), value
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    return found


def page_of(path: Path, out: Path, **options: object) -> Reader:
    write_page(str(path), str(out), **options)  # type: ignore[arg-type]
    return read(out.read_text(encoding="utf-8"))


def unpacked(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_pictures_captions_and_places(tmp_path: Path) -> None:
    write_source(tmp_path / "s", [3, 4])
    found = page_of(tmp_path / "s", tmp_path / "a.html", show=6)
    assert found.tags.count("img") == 12
    assert found.tags.count("article") == 6
    for part in (
        "a blue dot of number 0",
        "000000000 .png in 00000.tar",
        "24 × 20",
        "7 samples",
        "Words per caption",
    ):
        assert part.replace(" ", "") in found.visible_text.replace(" ", ""), part
    assert "No problems found" in found.visible_text


def test_the_crop_is_that_of_training_and_the_thumbnail_is_the_picture() -> None:
    original = pixels(0, 0, 40, 50)
    mirrored = 0
    for number in range(12):
        picture = decode_picture(encode(original), ImageSpec(32, (0.4, 1.0), True), f"key {number}")
        np.testing.assert_array_equal(unpacked(picture.whole), original)
        x, y, w, h = (round(part * side / 100) for part, side in zip(picture.box, (50, 40) * 2, strict=True))
        assert picture.box_pixels == (w, h)
        image = (
            Image.fromarray(original).crop((x, y, x + w, y + h)).resize((32, 32), Image.Resampling.BICUBIC)
        )
        if picture.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.testing.assert_array_equal(unpacked(picture.crop), np.asarray(image))
        mirrored += picture.mirrored
    assert 0 < mirrored < 12


def test_a_picture_stored_on_its_side_is_shown_upright() -> None:
    image = Image.fromarray(pixels(0, 0, 20, 60))
    exif = image.getexif()
    exif[0x0112] = 6
    picture = decode_picture(encode(image, "PNG", exif=exif.tobytes()), ImageSpec(16), "k")
    assert (picture.width, picture.height) == (20, 60)
    np.testing.assert_array_equal(unpacked(picture.whole), np.rot90(pixels(0, 0, 20, 60), -1))


def test_a_large_picture_is_made_small() -> None:
    picture = decode_picture(encode(np.full((900, 1600, 3), 90, np.uint8), "JPEG"), ImageSpec(224), "k")
    assert (picture.width, picture.height) == (1600, 900)
    assert unpacked(picture.whole).shape == (236, 420, 3)
    assert len(picture.whole) < 20_000
    with pytest.raises(ContentError, match="too many pixels"):
        decode_picture(encode(np.zeros((9, 9, 3), np.uint8)), ImageSpec(8, max_pixels=80), "k")


def test_hostile_captions_keys_and_metadata_are_letters(tmp_path: Path) -> None:
    row = img2dataset.Row(EVIL, EVIL, encode(pixels(0, 0)), 24, 20, extra={"x": EVIL}, extension="png")
    bad = img2dataset.Row("u", "c", None, status="failed_to_download", error_message=EVIL)
    img2dataset.write_shard(str(tmp_path / "s"), 0, [row, bad])
    with TarWriter(tmp_path / "s" / "00001.tar") as tar:
        tar.write("<b>key", {"jpg": b"no picture", "txt": EVIL.encode()})
        tar.write("caption", {"png": encode(pixels(0, 1)), "txt": b"\xff\xfe<i>"})
    found = page_of(tmp_path / "s", tmp_path / "a.html")
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in found.visible_text
    assert "{{ 7*7 }}" in found.visible_text
    assert "49" not in found.visible_text.split()
    assert "<b>key" in found.visible_text
    assert "b" not in found.tags


def test_unusable_samples_are_on_the_page(tmp_path: Path) -> None:
    good = {"png": encode(pixels(0, 0)), "txt": b"fine"}
    members = {
        "broken": {"jpg": b"\xff\xd8 no picture", "txt": b"x"},
        "bomb": {"png": encode(Image.new("1", (6000, 6000))), "txt": b"x"},
        "silent": {"png": good["png"], "txt": b"  "},
        "imageless": {"txt": b"x"},
        "good": good,
    }
    with TarWriter(tmp_path / "0.tar") as tar:
        for key, content in members.items():
            tar.write(key, content)
    report = inspect_source(str(tmp_path))
    page = build_page(report, 8)
    assert {(bad["place"], bad["reason"]) for bad in page.bad} == {
        ("broken", "undecodable"), ("bomb", "too many pixels"), ("silent", "missing caption"),
        ("imageless", "missing image"),
    }  # fmt: skip
    assert {picture.key for picture in page.pictures} == {"silent", "good"}
    assert "4 of 5 (80.0 %) samples decoded are unusable" in report.problems[-1]
    text = page_of(tmp_path, tmp_path / "a.html").visible_text
    assert "Problems:" in text
    assert "too many pixels" in text


def test_captions_are_those_of_training(tmp_path: Path) -> None:
    """Captions come from all json fields that training reads, and broken JSON has the reason that training counts."""
    png = encode(pixels(0, 0))
    members = {
        "top": {"png": png, "json": json.dumps({"top_caption": "a red fox", "url": "http://x"}).encode()},
        "all": {"png": png, "json": json.dumps({"captions": ["", " two words "]}).encode()},
        "broken": {"png": png, "json": b"{"},
    }
    with TarWriter(tmp_path / "0.tar") as tar:
        for key, content in members.items():
            tar.write(key, content)
    report = inspect_source(str(tmp_path))
    assert {sample["key"]: sample["caption"] for sample in report.about["first"]} == {
        "top": "a red fox", "all": "two words", "broken": "",
    }  # fmt: skip
    page = build_page(report, 3)
    assert {picture.caption for picture in page.pictures} == {"a red fox", "two words", ""}
    assert [(bad["place"], bad["reason"]) for bad in page.bad] == [("broken", "bad json")]
    assert report.series["words"] == [3, 2]


def test_failures_by_reason(tmp_path: Path) -> None:
    rows = [img2dataset.Row(f"u{n}", "c", encode(pixels(0, n)), 24, 20, extension="png") for n in range(3)]
    rows += [img2dataset.Row("f", "c", None, status="failed_to_resize", error_message="image too small")] * 5
    img2dataset.write_shard(str(tmp_path / "s"), 0, rows)
    text = page_of(tmp_path / "s", tmp_path / "a.html").visible_text
    assert "3 of 8 rows have an image (37.5 %)" in text
    assert "failed_to_resize: image too small 5" in text


def test_conversations_are_a_chat_with_their_pictures(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encode(pixels(0, 0)))
    (tmp_path / "images" / "no.png").write_bytes(b"none")
    records = [
        talk(f"human: <image>\n{EVIL}", "gpt: <b>bold</b>", id="first", image="a.png"),
        talk("human: <image>", "gpt: x", image="no.png"),
        talk("human: <image>", "gpt: x", image="gone.png"),
        talk("human: <image>", "gpt: x", image="../../../etc/passwd"),
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    found = page_of(tmp_path / "a.json", tmp_path / "a.html", images=str(tmp_path / "images"))
    assert found.tags.count("img") == 1
    assert found.tags.count("article") == 3
    assert "user <image>" in found.visible_text
    assert "<b>bold</b>" in found.visible_text
    assert "gone.png could not be read in" in found.visible_text
    assert "no.png: undecodable" in found.visible_text
    assert "unsafe image path" in found.visible_text


def test_boxes_of_an_answer_are_drawn_on_the_picture(tmp_path: Path) -> None:
    assert location_boxes("<loc0256><loc0512><loc0768><loc1023> cat ; <loc0001>") == [
        (50.0, 25.0, pytest.approx(49.9, abs=0.01), 50.0)
    ]
    (tmp_path / "a.png").write_bytes(encode(pixels(0, 0)))
    line = {"image": "a.png", "prefix": "detect cat", "suffix": "<loc0256><loc0512><loc0768><loc1023> cat"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    found = page_of(tmp_path / "a.jsonl", tmp_path / "a.html")
    assert ("style", "left: 50.00%; top: 25.00%; width: 49.90%; height: 50.00%") in found.attributes
    assert "detect cat" in found.visible_text


def test_tables_documents_and_packed_text_have_pages(tmp_path: Path) -> None:
    laion(tmp_path / "a.parquet", 300)
    text = page_of(tmp_path / "a.parquet", tmp_path / "a.html").visible_text
    for part in (
        "LAION-2B",
        "Width and height",
        "punsafe: probability",
        "http://a/0",
        "caption 0",
        "Columns",
    ):
        assert part in text
    refinedweb.write_documents(
        str(tmp_path / "d" / "0.parquet"), [refinedweb.Document(EVIL * 9, "http://x")] * 3
    )
    text = page_of(tmp_path / "d", tmp_path / "b.html").visible_text
    assert "The first documents" in text
    assert "<script>alert(1)</script>" in text
    write_packed(tmp_path / "p", [3])
    text = page_of(tmp_path / "p", tmp_path / "c.html").visible_text
    assert "packed text" in text
    assert "000000002" in text


@pytest.mark.parametrize(
    ("values", "log"),
    [([1, 2, 3, 3, 7], False), ([0.1, 0.25, 0.9], False), ([3, 50, 4000, 100_000], True), ([0, 1, 500], True),
     ([5] * 9 + [6], False), (list(range(1000)), False), ([1e-9, 1.0], True), ([float("nan"), 1, 2], False)],
)  # fmt: skip
def test_a_histogram_counts_every_value_and_stays_in_its_frame(values: list[float], log: bool) -> None:
    figure = charts.histogram("t", values, "words", log)
    assert figure is not None
    finite = [value for value in values if value == value]
    counts = [int(count.replace(",", "")) for count in re.findall(r"<title>([\d,]+)</title>", figure.svg)]
    assert sum(counts) == len(finite)
    for x, width in re.findall(r'<rect x="([-\d.]+)" y="[-\d.]+" width="([-\d.]+)"', figure.svg):
        assert 0 <= float(x) <= float(x) + float(width) <= charts.WIDTH
    ticks = re.findall(r'text-anchor="middle">', figure.svg)
    assert 1 <= len(ticks) <= 12


def test_values_without_a_plot_are_described() -> None:
    assert charts.histogram("t", [], "words") is None
    same = charts.histogram("t", [4, 4], "words")
    assert same is not None
    assert (str(same.svg), same.note) == ("", "all 2 are 4 words")
    assert charts.scatter("t", [], []) is None
    square = charts.scatter("t", [32, 32], [32, 32])
    assert square is not None
    assert square.note == "all 2 are 32 × 32 pixels"
    points = charts.scatter("t", [10, 20, 30, 40], [20, 20, 20, 20])
    assert points is not None
    assert "2 wider than high, 1 higher than wide, 1 square" in points.note
    assert points.svg.count("<circle") == 4


def test_the_command(tmp_path: Path) -> None:
    write_source(tmp_path / "s", [3])
    done = dromos(
        "data", "show", str(tmp_path / "s"), "--html", str(tmp_path / "page.html"), "--samples", "2"
    )
    assert done.exit_code == 0
    assert "page.html: written" in done.stdout
    assert read((tmp_path / "page.html").read_text()).tags.count("article") == 2
    (tmp_path / "s" / "00001.tar").write_bytes(b"x" * 600)
    done = dromos("data", "show", str(tmp_path / "s"), "--html", str(tmp_path / "page.html"))
    assert done.exit_code == 2
    assert "Problems:" in read((tmp_path / "page.html").read_text()).visible_text
    done = dromos("data", "show", str(tmp_path / "s"), str(tmp_path / "s"), "--html", "x.html")
    assert done.exit_code == 2
    assert "a page shows one source" in done.stderr
