"""Conversations of LLaVA, ShareGPT and their ports, prompts of PaliGemma, and the records that are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ContentError
from data_pipeline.formats import instructions, paligemma
from data_pipeline.formats.instructions import Conversation, Turn, read_conversations
from data_pipeline.formats.paligemma import Prompted, read_prompted
from data_pipeline.formats.records import BadRecord, check_image_path, image_url

LLAVA = {
    "id": "004539375",
    "image": "00453/004539375.jpg",
    "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
    ],
}


def talk(*turns: str, **more: Any) -> dict[str, Any]:
    """A LLaVA record with the given turns, each written as "human: hello"."""
    split = [turn.partition(": ") for turn in turns]
    return {"conversations": [{"from": a, "value": c} for a, _, c in split], **more}


def test_the_public_record() -> None:
    found = instructions.parse(LLAVA)
    assert found == Conversation(
        "004539375",
        (
            Turn("user", LLAVA["conversations"][0]["value"]),
            Turn("assistant", LLAVA["conversations"][1]["value"]),
        ),
        ("00453/004539375.jpg",),
    )


@pytest.mark.parametrize(
    ("record", "roles", "images", "name"),
    [
        (talk("human: hi", "gpt: ho"), ["user", "assistant"], (), None),
        (talk("human: hi", "gpt: ho", id=17), ["user", "assistant"], (), "17"),
        (talk("system: be", "user: hi", "assistant: ho", id="x", image=None), ["system", "user", "assistant"], (), "x"),
        (talk("Human: hi", "GPT: ho", image=""), ["user", "assistant"], (), None),
        (talk("human: <image> and <image>", "gpt: ho", image=["a.jpg", "b/c.png"]), ["user", "assistant"],
         ("a.jpg", "b/c.png"), None),
        (talk("human: no token", "gpt: ho", image="a.jpg"), ["user", "assistant"], ("a.jpg",), None),
        ({"messages": [{"role": "user", "content": "<image>hi"}, {"role": "assistant", "content": "ho"}],
          "images": ["a.jpg"]}, ["user", "assistant"], ("a.jpg",), None),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}],
          "images": [{"path": "a.jpg", "bytes": None}]}, ["user", "assistant"], ("a.jpg",), None),
        (talk("human: 1", "gpt: 2", "human: 3", "gpt: 4"), ["user", "assistant"] * 2, (), None),
        (talk("human: 1", "gpt: 2", "human: 3"), ["user", "assistant", "user"], (), None),
    ],
)  # fmt: skip
def test_ports_and_variants(
    record: dict[str, Any], roles: list[str], images: tuple[str, ...], name: str | None
) -> None:
    found = instructions.parse(record)
    assert [turn.role for turn in found.turns] == roles
    assert (found.images, found.id) == (images, name)


def test_parts_of_a_message_become_one_text() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}],
        "images": ["i"],
    }
    assert instructions.parse(record).turns[0].text == "<image>\nwhat?"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["human", "gpt"], "no object"),
        ({"id": 1, "image": "a.jpg"}, "no turns"),
        ({"conversations": []}, "no turns"),
        ({"conversations": "human: hi"}, "no turns"),
        ({"conversations": [{"from": "human"}]}, "bad turn"),
        ({"conversations": [{"value": "x"}]}, "bad turn"),
        ({"conversations": ["x"]}, "bad turn"),
        ({"conversations": [{"from": "human", "value": 3}]}, "bad turn"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "bad turn"),
        (talk("narrator: once"), "unknown role"),
        (talk("human: hi"), "no answer"),
        (talk("gpt: ho", "human: hi"), "wrong turn order"),
        (talk("human: hi", "human: hi", "gpt: ho"), "wrong turn order"),
        (talk("human: hi", "system: be", "gpt: ho"), "wrong turn order"),
        (talk("human: <image>", "gpt: ho"), "<image> count"),
        (talk("human: <image><image>", "gpt: ho", image="a.jpg"), "<image> count"),
        (talk("human: hi", "gpt: ho", image=["a.jpg", "b.jpg"]), "<image> count"),
        (talk("human: hi", "gpt: <image>", image="a.jpg"), "<image> count"),
        (talk("human: <image>", "gpt: ho", image="../../etc/passwd"), "unsafe image path"),
        (talk("human: <image>", "gpt: ho", image=7), "missing image"),
        (talk("human: <image>", "gpt: ho", image=[{"bytes": "x"}]), "missing image"),
        (talk("human: a\ud800b", "gpt: ho"), "not UTF-8"),
        (talk("human: hi", "gpt: ho", id=["x"]), "bad id"),
    ],
)  # fmt: skip
def test_what_is_refused_and_why(record: Any, reason: str) -> None:
    with pytest.raises(ContentError) as error:
        instructions.parse(record)
    assert error.value.reason == reason


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_files_of_both_shapes_give_records_and_bad_records_by_place(suffix: str, tmp_path: Path) -> None:
    values = [LLAVA, talk("human: hi"), talk("human: hi", "gpt: ho", id=3)]
    listed = json.dumps(values, indent=2) if suffix == "json" else "\n".join(map(json.dumps, values))
    (tmp_path / f"a.{suffix}").write_text(listed)
    path = str(tmp_path / f"a.{suffix}")
    (_, first), (place, second), (_, third) = read_conversations(path)
    assert isinstance(first, Conversation)
    assert first.id == "004539375"
    assert second == BadRecord(path, place, "no answer", "1 turns, none of them by the assistant")
    assert place == ("entry 1" if suffix == "json" else "line 2")
    assert isinstance(third, Conversation)
    assert third.id == "3"


def test_bytes_in_a_list_that_are_not_utf8_are_bad_records(tmp_path: Path) -> None:
    text = json.dumps([talk("human: h@", "gpt: ho")]).encode().replace(b"@", b"\xff")
    (tmp_path / "a.json").write_bytes(text)
    ((_, found),) = read_conversations(str(tmp_path / "a.json"))
    assert isinstance(found, BadRecord)
    assert found.reason == "not UTF-8"


SAFE = {"a.jpg": "a.jpg", "a//b/./c.jpg": "a/b/c.jpg", "a b/ü.jpg": "a b/ü.jpg", "..a/b...jpg": "..a/b...jpg"}
UNSAFE = ["../a.jpg", "a/../../b", "a/..", "/etc/passwd", "~/a", "~root/a", "file:///etc/passwd", "http://x/a.jpg",
          "s3://bucket/a", "C:\\a.jpg", "a\\..\\b", "a\0b", "a\nb", "./.", "\ud800.jpg",
          "data:image/png;base64,AA"]  # fmt: skip


def test_image_paths_stay_below_their_folder() -> None:
    assert {path: check_image_path(path) for path in SAFE} == SAFE
    for path in UNSAFE:
        for root in (None, "/data/images", "s3://bucket/images"):
            with pytest.raises(ContentError) as error:
                check_image_path(path, root)
            assert error.value.reason == "unsafe image path"
    with pytest.raises(ContentError, match="missing image"):
        check_image_path(" ")


def test_an_absolute_path_is_taken_below_the_folder_that_the_user_gave() -> None:
    assert check_image_path("/data/images/a/b.jpg", "/data/images/") == "a/b.jpg"
    assert image_url("/data/images/a/b.jpg", "/data/images") == "/data/images/a/b.jpg"
    assert image_url("a.jpg", "s3://bucket/images") == "s3://bucket/images/a.jpg"
    for path in ("/data/images/../x", "/data/images2/a.jpg", "/data/images/"):
        with pytest.raises(ContentError, match="unsafe image path"):
            check_image_path(path, "/data/images")


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"image": "a.jpg", "prefix": "caption en", "suffix": "a dot"}, Prompted("a.jpg", "caption en", "a dot")),
        ({"image": "a.jpg", "prefix": "", "suffix": "a dot"}, Prompted("a.jpg", "", "a dot")),
        ({"image": "a.jpg", "suffix": "a dot"}, Prompted("a.jpg", "", "a dot")),
        ({"image": "a.jpg", "prefix": "detect dot"}, Prompted("a.jpg", "detect dot", None)),
        ({"prefix": "p", "suffix": "s", "more": 1}, Prompted(None, "p", "s")),
        ({"image": "a.jpg", "prefix": "segment x", "suffix": "<loc0000><loc1023><loc0001><loc0002><seg000><seg127> x"},
         Prompted("a.jpg", "segment x", "<loc0000><loc1023><loc0001><loc0002><seg000><seg127> x")),
    ],
)  # fmt: skip
def test_prompts_and_suffixes(record: dict[str, Any], found: Prompted) -> None:
    assert paligemma.parse(record) == found


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "no object"),
        ({"image": "a.jpg", "text": "x"}, "no prefix or suffix"),
        ({"image": ["a.jpg"], "prefix": "x"}, "missing image"),
        ({"image": "/a.jpg", "prefix": "x"}, "unsafe image path"),
        ({"prefix": 3}, "bad text"),
        ({"prefix": "x", "suffix": "<loc1024>"}, "bad location token"),
        ({"prefix": "x", "suffix": "<loc12>"}, "bad location token"),
        ({"prefix": "x", "suffix": "<seg128>"}, "bad location token"),
        ({"prefix": "\udcff"}, "not UTF-8"),
    ],
)
def test_prompts_that_are_refused(record: Any, reason: str) -> None:
    with pytest.raises(ContentError) as error:
        paligemma.parse(record)
    assert error.value.reason == reason


def test_a_prompts_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"image": "a.jpg", "prefix": "p", "suffix": "s"}\n\n{"image": "a.jpg"\n{"prefix": "q"}\n'
    )
    found = list(read_prompted(str(path)))
    assert [place for place, _ in found] == ["line 1", "line 3", "line 4"]
    assert [getattr(value, "reason", "") for _, value in found] == ["", "bad json", ""]
