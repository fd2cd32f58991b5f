"""Text in every encoding that people bring, against Python's own codecs: members, TSV, jsonl, json and tables alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import ContentError, UserError
from data_pipeline.formats import cc3m, detect, instructions, laion, paligemma
from data_pipeline.formats.laion import Pair
from data_pipeline.formats.records import BadRecord
from data_pipeline.formats.text_records import bytes_read, open_text, records
from data_pipeline.show import describe
from data_pipeline.text_encoding import check_text, decode_line, decode_text
from data_pipeline.transforms.captions import CaptionSpec, pick_caption
from data_pipeline.transforms.text_formats import TextSpec
from tests.support.samples import write_source

# The captions of joy-caption-batch #1 and stable-diffusion-webui #3657 were such texts.
TEXT = "a café’s naïve “façade” in red no. 0"
CHINESE = "一只红色的猫在路上"
LE, BE, MARK = b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"
# Name -> (bytes, text or the reason why it is unusable).
ENCODED = {
    "utf-8": (TEXT.encode(), TEXT),
    "utf-8 with mark": (MARK + TEXT.encode(), TEXT),
    "utf-8 with two marks": (MARK * 2 + TEXT.encode(), TEXT),
    "utf-16 le": (LE + TEXT.encode("utf-16-le"), TEXT),
    "utf-16 be": (BE + TEXT.encode("utf-16-be"), TEXT),
    "utf-16 beyond the first plane": (LE + "a 🐈 dot".encode("utf-16-le"), "a 🐈 dot"),
    "a mark inside is text": ("a \ufeff dot".encode(), "a \ufeff dot"),
    "cp1252": (TEXT.encode("cp1252"), "not UTF-8"),
    "gbk": (CHINESE.encode("gbk"), "not UTF-8"),
    "shift_jis": ("赤い車".encode("shift_jis"), "not UTF-8"),
    "latin-1 at the end of a long text": (("x" * 100_000 + "é").encode("latin-1"), "not UTF-8"),
    "utf-8 cut inside a character": ("dot é".encode()[:-1], "not UTF-8"),
    "a surrogate as three bytes": (b"dot \xed\xa0\x80", "not UTF-8"),
    "utf-32 le": (LE + b"\0\0" + TEXT.encode("utf-32-le"), "not UTF-8"),
    "utf-32 be": (b"\0\0" + BE + TEXT.encode("utf-32-be"), "not UTF-8"),
    "utf-16 cut inside a character": (LE + TEXT.encode("utf-16-le")[:-1], "not UTF-8"),
    "utf-16 of half a pair": (LE + "a 🐈".encode("utf-16-le")[:-2], "not UTF-8"),
    "utf-16 without mark": ("a red dot".encode("utf-16-le"), "NUL in text"),
    "nul at the end": (b"a red dot\0", "NUL in text"),
    "nul in utf-16": (LE + "a\0b".encode("utf-16-le"), "NUL in text"),
}
REASONS = ("not UTF-8", "NUL in text")


def outcome(read: Callable[[], str]) -> str | ContentError:
    try:
        return read()
    except ContentError as error:
        return error


def verdict(members: dict[str, bytes], draw: int | None = None, spec: CaptionSpec | None = None) -> str:
    """The caption, or the reason why there is none."""
    found = outcome(lambda: pick_caption(members, draw, spec)[0])
    if isinstance(found, str):
        return found
    assert found.detail.isprintable()
    assert len(found.detail) < 200
    return found.reason


@pytest.mark.parametrize("name", ENCODED)
def test_a_caption_in_a_member(name: str) -> None:
    data, expected = ENCODED[name]
    assert verdict({"txt": data}) == expected
    assert verdict({"txt": data}, None, CaptionSpec(("txt",))) == expected
    # A caption that is there and unusable is no reason to take another one in silence.
    assert verdict({"txt": data, "json": b'{"caption": "other"}'}) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "gbk", "utf-32", "utf-16-le"])
def test_a_json_member(encoding: str) -> None:
    text = {"gbk": CHINESE, "utf-16-le": "a red dot"}.get(encoding, TEXT)
    data = json.dumps({"caption": text}, ensure_ascii=False).encode(encoding)
    expected = {"cp1252": "not UTF-8", "gbk": "not UTF-8", "utf-32": "not UTF-8", "utf-16-le": "NUL in text"}
    assert verdict({"json": data}) == expected.get(encoding, text)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("bad", "reason"), [("a \0 b", "NUL in text"), ("a \ud83d", "not UTF-8")])
def test_one_bad_text_of_several_is_a_verdict_whatever_is_drawn(place: int, bad: str, reason: str) -> None:
    texts = ["one", "two", "three"]
    texts[place] = bad
    given = {"json": json.dumps({"captions": texts}).encode()}
    found = {verdict(given, draw) for draw in (None, 0, 1 << 63, (1 << 64) - 1)}
    found |= {
        verdict(given, draw, CaptionSpec(("json.captions",), top=1)) for draw in (None, 0, (1 << 64) - 1)
    }
    assert found == {reason}
    # Fields that are not read have no influence.
    assert verdict({"txt": b"good", **given}) == "good"


def test_a_mark_in_a_json_text_is_removed_and_a_caption_of_a_mark_alone_is_blank() -> None:
    assert verdict({"json": json.dumps({"caption": "\ufeffa dot"}).encode()}) == "a dot"
    assert verdict({"txt": MARK}) == verdict({"json": rb'{"caption": "\ufeff"}'}) == "missing caption"
    assert verdict({"txt": MARK + b"\n", "json": b'{"caption": "a dot"}'}) == "a dot"


@given(st.text(), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-16-be"]))
def test_any_text_is_that_of_python_s_codec_or_a_verdict(text: str, encoding: str) -> None:
    data = text.encode(encoding, "ignore")
    try:
        expected = data.decode("utf-16" if data[:2] in (LE, BE) else "utf-8").lstrip("\ufeff")
    except UnicodeDecodeError:
        expected = None
    found = outcome(lambda: decode_text(data))
    if isinstance(found, ContentError):
        assert found.reason == ("not UTF-8" if expected is None else "NUL in text")
        assert expected is None or "\0" in expected
    else:
        assert found == expected
        assert "\0" not in found


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=8))  # lone surrogates included
def test_a_parsed_text_is_kept_or_refused(text: str) -> None:
    valid = not any("\ud800" <= letter <= "\udfff" for letter in text)
    found = outcome(lambda: check_text(text))
    if isinstance(found, ContentError):
        assert found.reason == ("NUL in text" if valid else "not UTF-8")
        assert not valid or "\0" in text
    else:
        assert found == text.lstrip("\ufeff")
        assert valid
        assert "\0" not in text


def test_samples_are_replaced_and_counted_under_the_reason(tmp_path: Path) -> None:
    bad = {"cp1252": 2, "utf-16 without mark": 7, "gbk": 9}
    good = {"utf-16 le": 3, "utf-8 with mark": 4}
    png = {"png": b""}
    replaced = {(0, place): png | {"txt": ENCODED[name][0]} for name, place in (bad | good).items()}
    plain = {(0, place): png | {"txt": TEXT.encode()} for place in good.values()}
    batches = []
    for folder, chosen in (("a", replaced), ("b", plain)):
        write_source(tmp_path / folder, [12], chosen)
        spec = StreamSpec(
            "pairs", 0, {"s": SourceSpec(str(tmp_path / folder))}, batch=12, text=TextSpec("clip-bpe", 24)
        )
        batches.append(BatchBuilder(spec).make(0, 0, 12))
    found, clean = batches
    reasons = {line["key"]: line["reason"] for line in found.bad if line["attempt"] == 0}
    assert reasons == {"000000002": "not UTF-8", "000000007": "NUL in text", "000000009": "not UTF-8"}
    assert set(found.skipped["s"]) == set(REASONS)
    # Marks have no influence: rows with the same sample have the same tokens.
    same = found.sample_ids == clean.sample_ids
    assert same.sum() >= 9
    assert (found.fields["tokens"][same] == clean.fields["tokens"][same]).all()


def test_a_source_without_usable_caption_is_refused_with_reason_and_advice(tmp_path: Path) -> None:
    write_source(tmp_path / "s", [10], {(0, n): {"txt": TEXT.encode("cp1252")} for n in range(10)})
    spec = StreamSpec(
        "pairs", 0, {"s": SourceSpec(str(tmp_path / "s"))}, batch=2, text=TextSpec("clip-bpe", 9)
    )
    with pytest.raises(UserError, match=r"not UTF-8\).*00000\.tar.*byte 5 is 0xe9; write it again as UTF-8"):
        BatchBuilder(spec).check()


def shown(values: Any) -> list[Any]:
    return [(value.place, value.reason) if isinstance(value, BadRecord) else value for value in values]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark", "utf-16-be with mark"]
)
def test_lines_and_lists_in_an_encoding_with_mark(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if "with mark" in encoding else ""
    codec = encoding.removesuffix(" with mark")
    # More than a chunk, so that characters lie across its end.
    texts = [f"{n} {TEXT} {CHINESE} 🐈" for n in range(3000)]

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_bytes((mark + text).encode(codec))
        return str(tmp_path / name)

    pairs = cc3m.read_pairs(write("a.tsv", "".join(f"{text}\thttp://{n}\n" for n, text in enumerate(texts))))
    assert list(pairs) == [Pair(f"http://{n}", (text,)) for n, text in enumerate(texts)]
    entries = [{"image": "i.png", "prefix": text, "suffix": "x"} for text in texts]
    lines = write("a.jsonl", "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    assert detect(lines).name == "paligemma"
    assert [p.prefix for _, p in paligemma.read_prompted(lines) if not isinstance(p, BadRecord)] == texts
    talks = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]} for text in texts
    ]
    listed = write("a.json", json.dumps(talks, ensure_ascii=False))
    assert detect(listed).name == "llava"
    found = [
        c.turns[0].text for _, c in instructions.read_conversations(listed) if not isinstance(c, BadRecord)
    ]
    assert found == texts
    about = describe(listed)
    assert about["problems"] == []
    assert about["samples"] == 3000
    unnamed = write("lines", "".join(f"{text}\thttp://{n}\n" for n, text in enumerate(texts * 3)))
    about = describe(unnamed)  # only 5000 lines are read; their number follows from the bytes
    assert about["format"] == "cc3m"
    assert about["estimated"] == pytest.approx(9000, rel=0.2)


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "utf-16-le", "utf-8"])
@pytest.mark.parametrize("place", [0, 5, 10])
def test_one_line_in_another_encoding_or_with_nul(encoding: str, place: int, tmp_path: Path) -> None:
    text = {"gbk": CHINESE, "utf-8": "a \0 b", "utf-16-le": "abc"}.get(encoding, TEXT)
    reason = "NUL in text" if encoding in ("utf-8", "utf-16-le") else "not UTF-8"
    lines = [f"caption {n}\thttp://{n}".encode() for n in range(11)]
    lines[place] = text.encode(encoding) + b"\thttp://x"
    (tmp_path / "a.tsv").write_bytes(b"\n".join(lines))
    found = shown(cc3m.read_pairs(str(tmp_path / "a.tsv")))
    assert found[place] == (f"line {place + 1}", reason)
    assert len([value for value in found if isinstance(value, Pair)]) == 10
    entries = [json.dumps({"prefix": f"p {n}"}).encode() for n in range(11)]
    entries[place] = b'{"prefix": "' + text.encode(encoding) + b'"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(entries))
    found = shown(value for _, value in paligemma.read_prompted(str(tmp_path / "a.jsonl")))
    assert found[place] == (f"line {place + 1}", reason)
    for file in ("a.tsv", "a.jsonl"):
        about = describe(str(tmp_path / file))
        assert about["verdicts"] == {reason: 1}
        assert len(about["problems"]) == 1


@pytest.mark.parametrize("bad", ["a \0 b", "a \ud83d"])
def test_escapes_in_instructions(bad: str, tmp_path: Path) -> None:
    reason = "NUL in text" if "\0" in bad else "not UTF-8"
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": bad}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))
    (found,) = instructions.read_conversations(str(tmp_path / "a.json"))
    assert isinstance(found[1], BadRecord)
    assert found[1].reason == reason
    (tmp_path / "b.jsonl").write_text(json.dumps({"prefix": "p", "suffix": bad}))
    (prompted,) = paligemma.read_prompted(str(tmp_path / "b.jsonl"))
    assert isinstance(prompted[1], BadRecord)
    assert prompted[1].reason == reason


def test_captions_with_nul_in_a_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"URL": ["http://1", "http://2", "http://3"], "TEXT": ["a", "b\0", "\ufeffc"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert shown(laion.read_pairs(str(tmp_path / "a.parquet"))) == [
        Pair("http://1", ("a",), (None,)),
        ("row 1", "NUL in text"),
        Pair("http://3", ("c",), (None,)),
    ]


def test_marks_inside_joined_files_are_removed(tmp_path: Path) -> None:
    part = MARK + b"a dot\thttp://1\n"
    (tmp_path / "a.tsv").write_bytes(part * 3)
    assert list(cc3m.read_pairs(str(tmp_path / "a.tsv"))) == [Pair("http://1", ("a dot",))] * 3
    (tmp_path / "a.jsonl").write_bytes((MARK + b'{"prefix": "p"}\n' + MARK + b"\n") * 2)
    assert len(list(paligemma.read_prompted(str(tmp_path / "a.jsonl")))) == 2
    assert decode_line(MARK + b"x") == "x"


def test_a_utf16_file_can_be_read_twice_and_its_damage_is_one_bad_line(tmp_path: Path) -> None:
    text = (
        LE
        + 'one\n{"a": 1}\n'.encode("utf-16-le")
        + "\ud83d x\nlast".encode("utf-16-le", "surrogatepass")
        + b"\0"
    )
    (tmp_path / "a.jsonl").write_bytes(text)
    with open_text(str(tmp_path / "a.jsonl")) as file:
        first = shown(value for _, value in records("a", file))
        assert bytes_read(file) == len(text)
        file.seek(0)
        assert shown(value for _, value in records("a", file)) == first
    assert first == [("line 1", "bad json"), {"a": 1}, ("line 3", "not UTF-8"), ("line 4", "not UTF-8")]
