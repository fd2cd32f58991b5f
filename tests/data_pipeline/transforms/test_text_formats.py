"""A text format of the user's own: its arrays reach the batch from any worker, and its mistakes are said."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from data_pipeline import ImageSpec, PackedFormat, RowArray, Stream, TextFormat, TextRow, TextSpec, UserError
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import ContentError
from data_pipeline.hashing import Purpose, hash64
from tests.support.samples import LENGTH, pairs, write_packed, write_source


@dataclass(frozen=True)
class Label(TextFormat):
    """The label of a sample, its draw, and a small table of both."""

    name: str = "label"
    tokenizer = None
    length = 0

    @property
    def arrays(self) -> Mapping[str, RowArray]:
        return {
            self.name: RowArray("int16"),
            "draw": RowArray("uint64"),
            "table": RowArray("float32", (2, 3)),
            "even": RowArray("bool"),
        }

    @property
    def expected(self) -> str:
        return "a label (json)"

    def row(self, members: Mapping[str, bytes], tokenizer: object, draw: int | None) -> TextRow:
        label = int(json.loads(members["json"])["label"])
        if label == 2:
            raise ContentError("label 2")
        table = np.full((2, 3), label + 0.5, np.float32)
        return TextRow({self.name: label, "draw": draw or 0, "table": table, "even": label % 2 == 0}, label)

    def dummy(self, tokenizer: object) -> Mapping[str, Any]:
        return {self.name: -1, "draw": 0, "table": np.zeros((2, 3), np.float32), "even": False}

    def mistakes(self) -> Iterator[str]:
        if self.name == "wrong":
            yield "name is wrong"


@pytest.mark.parametrize("workers", [0, 2])
def test_its_arrays_are_those_of_the_samples_that_are_served(tmp_path: Path, workers: int) -> None:
    source = write_source(tmp_path / "a", [7, 5])
    stream = Stream(
        str(source),
        20,
        image=ImageSpec(8),
        text=Label(),
        rank=1,
        world_size=3,
        dummy_rows=True,
        workers=workers,
    )
    replaced = 0
    with stream:
        for _ in range(4):
            batch = next(stream)
            assert set(batch.fields) == {"pixels", "label", "draw", "table", "even"}
            assert {name: array.dtype.name for name, array in batch.fields.items()} == {
                "pixels": "uint8", "label": "int16", "draw": "uint64", "table": "float32", "even": "bool",
            }  # fmt: skip
            assert batch.fields["pixels"].shape == (7, 1, 8, 8, 3)
            assert batch.fields["table"].shape == (7, 2, 3)
            labels = batch.fields["label"]
            assert set(labels) == {0, 1}  # samples of label 2 were replaced
            assert (batch.fields["table"] == labels[:, None, None] + np.float32(0.5)).all()
            assert (batch.fields["even"] == (labels == 0)).all()
            assert (batch.fields["draw"] == hash64(batch.row_keys, Purpose.CAPTION)).all()
            replaced += batch.skipped.get("source", {}).get("label 2", 0)
            assert batch.tokens.shape == (7, 0)
            assert (batch.used == 0).all()
    assert replaced > 0


def test_dummy_rows_are_its_own(tmp_path: Path) -> None:
    spec = dataclasses.replace(pairs(tmp_path, batch=4, a=write_source(tmp_path / "a", [6])), text=Label())
    batch = BatchBuilder(spec).dummy_rows(0, 4, 2)
    assert batch.fields["label"].tolist() == [-1, -1]
    assert batch.weights.tolist() == [0, 0]


def test_its_choice_is_part_of_the_digest(tmp_path: Path) -> None:
    spec = dataclasses.replace(pairs(tmp_path, batch=4, a=write_source(tmp_path / "a", [6])), text=Label())
    other = dataclasses.replace(spec, text=dataclasses.replace(Label(), name="kind"))
    made, again = BatchBuilder(spec).make(0, 0, 4), BatchBuilder(other).make(0, 0, 4)
    assert made.batch_digest == again.batch_digest  # the choice, and not the name of an array

    class Shifted(Label):
        def row(self, members: Mapping[str, bytes], tokenizer: object, draw: int | None) -> TextRow:
            found = super().row(members, tokenizer, draw)
            return TextRow(found.arrays, found.choice + 1)

    changed = BatchBuilder(dataclasses.replace(spec, text=Shifted())).make(0, 0, 4)
    assert changed.batch_digest != made.batch_digest


@pytest.mark.parametrize("name", ["pixels", "images", "weights", "sample_ids", "keys", "row_keys"])
def test_a_name_that_every_batch_uses_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"data\.stream\.text: the format's array '{name}' has a name"):
        Stream(str(tmp_path), 4, text=Label(name))


def test_its_own_mistakes_are_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.stream\.text\.name is wrong"):
        Stream(str(tmp_path / "nowhere"), 4, text=Label("wrong"))


def test_a_stream_without_usable_text_says_what_was_expected(tmp_path: Path) -> None:
    label = {(0, n): {"json": b'{"label": 2}', "png": b""} for n in range(3)}
    source = write_source(tmp_path / "a", [3], label)
    with pytest.raises(UserError, match=r"\(label 2\).*Expected of every sample: a label \(json\)"):
        Stream(str(source), 2, text=Label())


def test_packed_text_has_one_shape_and_no_images(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "t", [9])
    with (
        Stream(str(source), 4, text=PackedFormat(LENGTH)) as one,
        Stream(str(source), 4, length=LENGTH) as two,
    ):
        assert one.order.samples_per_epoch() == 9
        np.testing.assert_array_equal(next(one).tokens, next(two).tokens)
    for given in ({"image": ImageSpec(8)}, {"text": TextSpec("clip-bpe", 8)}):
        with pytest.raises(UserError, match="or the length of packed text, not both"):
            Stream(str(source), 4, length=LENGTH, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [TextSpec("clip-bpe", 9), PackedFormat(9)])
def test_the_sizes_of_the_arrays_are_what_memory_is_planned_with(given: TextFormat) -> None:
    assert {name: array.bytes for name, array in given.arrays.items()} == {"tokens": 36, "used": 4}
    assert RowArray("float64", (2, 5)).bytes == 80


class Odd(Label):
    """A format that gives `given` in place of some of its arrays, or raises it."""

    given: ClassVar[Any] = None

    def row(self, members: Mapping[str, bytes], tokenizer: object, draw: int | None) -> TextRow:
        if isinstance(self.given, Exception):
            raise self.given
        found = super().row(members, tokenizer, draw)
        arrays = {name: value for name, value in {**found.arrays, **self.given}.items() if value is not None}
        return TextRow(arrays, found.choice)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"table": None}, "gave the arrays label, draw, even; it says label, draw, table, even"),
        ({"pixels": np.zeros(3)}, "gave the arrays label, draw, table, even, pixels; it says"),
        ({"table": 1.0}, r"gave float64 \[\] for the array 'table'; it says float32 \[2, 3\]$"),
        (
            {"table": np.zeros((3, 2))},
            r"gave float64 \[3, 2\] for the array 'table'; it says float32 \[2, 3\]$",
        ),
        ({"label": 2**15}, r"gave int64 \[\] for the array 'label'; it says int16 \[\], which does not hold"),
        ({"label": 1.5}, "which does not hold these values"),
        ({"label": float("nan")}, "which does not hold these values"),
        ({"label": "one"}, "which does not hold these values"),
        ({"even": 2}, "which does not hold these values"),
        ({"draw": -1}, "which does not hold these values"),
        (KeyError("foo"), "Odd failed: KeyError: 'foo'"),
        (UserError("no label"), "sample '000000000': no label"),
    ],
)
def test_a_row_that_is_not_what_it_promised_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, words: str
) -> None:
    monkeypatch.setattr(Odd, "given", given)
    member = {(0, n): {"json": b'{"label": 1}'} for n in range(3)}
    source = write_source(tmp_path / "a", [3], member)
    with pytest.raises(UserError, match=words) as found:
        next(Stream(str(source), 2, text=Odd()))
    assert str(found.value).startswith(f"data.stream.sources.source: {source}/00000.tar, sample '00000")


@pytest.mark.parametrize("value", [np.float64(1 / 3), np.int8(3), True, np.full((), 2, np.int64)])
def test_a_value_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    given = {"table": np.full((2, 3), float(value))} if isinstance(value, np.float64) else {"label": value}
    monkeypatch.setattr(Odd, "given", given)
    source = write_source(tmp_path / "a", [3], {(0, n): {"json": b'{"label": 1}'} for n in range(3)})
    batch = next(Stream(str(source), 2, text=Odd()))
    for name, expected in given.items():
        np.testing.assert_array_equal(batch.fields[name][0], np.asarray(expected, batch.fields[name].dtype))


def test_a_dummy_row_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Label, "dummy", lambda self, tokenizer: {"label": 0})
    spec = dataclasses.replace(pairs(tmp_path, batch=4, a=write_source(tmp_path / "a", [6])), text=Label())
    with pytest.raises(UserError, match=r"^data\.pairs: a dummy row: .*Label gave the arrays label; it says"):
        BatchBuilder(spec).dummy_rows(0, 4, 2)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (RowArray("floot"), "'draw': data type 'floot' not understood"),
        (RowArray("U5"), "'draw': dtype U5 is none of bool, integer and float"),
        (RowArray("int8", (2, -1)), r"'draw': \(2, -1\) is not a shape"),
    ],
)
def test_an_array_that_no_batch_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: RowArray, words: str
) -> None:
    monkeypatch.setattr(Label, "arrays", {"draw": array})
    with pytest.raises(UserError, match=rf"^data\.stream\.text: the format's array {words}"):
        Stream(str(tmp_path), 4, text=Label())


def test_a_format_that_workers_cannot_import_is_refused(tmp_path: Path) -> None:
    class Local(Label):
        pass

    source = str(write_source(tmp_path / "a", [3]))
    with Stream(source, 1, text=Local()) as stream:
        assert len(next(stream).fields["label"]) == 1  # this process has it
    with pytest.raises(
        UserError, match=r"^data\.stream\.text: workers cannot import the text format .*Local"
    ):
        Stream(source, 1, text=Local(), workers=1)


FORMAT = """
from dataclasses import dataclass
from data_pipeline import RowArray, TextFormat, TextRow

@dataclass(frozen=True)
class Size(TextFormat):
    tokenizer = None
    length = 0
    arrays = {"size": RowArray("int64")}
    expected = "txt"

    def row(self, members, tokenizer, draw):
        return TextRow({"size": len(members["txt"])})

    def dummy(self, tokenizer):
        return {"size": 0}
"""
SCRIPT = """
import sys
from data_pipeline import Stream
MAIN
if __name__ == "__main__":
    with Stream(sys.argv[1], 2, text=Size(), workers=1) as stream:
        print(next(stream).fields["size"].tolist())
"""


@pytest.mark.parametrize("beside", [True, False])
def test_a_format_beside_a_script_reaches_its_workers(tmp_path: Path, beside: bool) -> None:
    """A worker does not import from the folder of the script; one that is in the script itself is refused."""
    texts = {(0, n): {"txt": b"four"} for n in range(3)}
    source = write_source(tmp_path / "a", [3], texts)
    folder = tmp_path / "project"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "formats.py").write_text(FORMAT)
    use = "from mine.formats import Size" if beside else FORMAT
    (folder / "train.py").write_text(SCRIPT.replace("MAIN", use))
    ran = subprocess.run(
        [sys.executable, "project/train.py", str(source)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True,
        text=True,
    )
    if beside:
        assert (ran.returncode, ran.stdout) == (0, "[4, 4]\n"), ran.stderr
    else:
        assert (
            "workers cannot import the text format Size, which is defined in the script itself" in ran.stderr
        )


def test_damage_in_a_json_that_nobody_reads_costs_no_row(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.save(out, np.arange(LENGTH, dtype=np.uint16))
    packed = {(0, n): {"npy": out.getvalue(), "json": b"{bad"} for n in range(3)}
    source = write_source(tmp_path / "t", [3], packed)
    spec = StreamSpec("held_out", 0, {"a": SourceSpec(str(source))}, 3, text=PackedFormat(LENGTH))
    batch = EvaluationPass(spec).make(0, 0, 3)
    assert batch.weights.tolist() == [1, 1, 1]
    assert batch.meta == [{"key": f"0000{n:05d}", "caption": None, "json": {}} for n in range(3)]
