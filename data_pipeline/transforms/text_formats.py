"""Text formats: how the text of a sample becomes the named arrays of its row. `CaptionFormat` and `PackedFormat`.

A format is plain, immutable data in the StreamSpec. It travels to workers and actors as a pickled object, so a format
that another package defines works too; they import the module of its class. A recipe names formats by `TEXT_FORMATS`
(pretrain/recipe/sections/text_formats.py).
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from data_pipeline.errors import ContentError, UserError
from data_pipeline.transforms.captions import CaptionSpec, pick_caption
from data_pipeline.transforms.tokenizers import Tokenizer, caption_row

# Names that a batch gives to arrays of its own.
RESERVED = ("pixels", "images", "weights", "sample_ids", "keys", "row_keys")


@dataclass(frozen=True)
class RowArray:
    """A named array of a row: a batch has it as `[rows, *shape]`.

    dtype: a numpy dtype of bools, integers or floats; integers reach the device as int64 (uint64 with its bits), other
        types as they are
    """

    dtype: str
    shape: tuple[int, ...] = ()

    def mistake(self) -> str | None:
        """Why a batch cannot have such an array; None if it can."""
        try:
            kind = np.dtype(self.dtype).kind
        except TypeError as error:
            return str(error)
        if kind not in "biuf":
            return f"dtype {self.dtype} is none of bool, integer and float"
        if not all(isinstance(side, int) and side >= 0 for side in self.shape):
            return f"{self.shape} is not a shape"
        return None

    @property
    def bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class TextRow:
    """The text of one row.

    arrays: name -> value, for the names in `TextFormat.arrays`
    choice: number of the text among those of the sample; part of the digest of the batch. -1 if there is one only
    text: what was chosen, for evaluations; None for text that was tokenised beforehand
    """

    arrays: Mapping[str, np.ndarray | float]
    choice: int = -1
    text: str | None = None


class TextFormat(ABC):
    """How the members of a sample become the text of its row.

    A row must be a function of the members, the tokenizer and the draw alone: any worker may build it, and twice.

    tokenizer: for `load_tokenizer`; None for text that was tokenised beforehand
    length: tokens of a row, padding included
    random: whether a row depends on its draw
    slice_rows: in streams without images, rows that are worth a message to a worker of their own
    """

    tokenizer: str | None
    length: int
    random = True
    slice_rows = 8

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, RowArray]:
        """The arrays of a row. `tokens` and `used` (tokens that are not padding) are what most objectives read."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """What a sample must have, for messages: `a caption (txt)`."""

    @abstractmethod
    def row(self, members: Mapping[str, bytes], tokenizer: Tokenizer | None, draw: int | None) -> TextRow:
        """The text of a sample with these members (extension -> bytes).

        `draw`: integer below 2**64, random but the same whenever the row is built; None (evaluation): nothing is
        random. Raises ContentError if the sample is unusable and must be replaced, UserError if the recipe does not fit
        the data.
        """

    @abstractmethod
    def dummy(self, tokenizer: Tokenizer | None) -> Mapping[str, np.ndarray | float]:
        """The arrays of a dummy row. A model computes it like any other row: its result must be finite."""

    def mistakes(self) -> Iterator[str]:
        """Settings that are invalid whatever the data is: `length is 0; it must be at least 1 token`."""
        yield from ()


@dataclass(frozen=True)
class CaptionFormat(TextFormat):
    """`[start token][caption][end token][padding]`; a longer caption is cut.

    tokenizer: `clip-bpe`, or the path of a tokenizer.json or its folder
    length: tokens per row, start and end token included
    captions: location of the captions and choice among several; None: see `captions.pick_caption`
    """

    tokenizer: str
    length: int
    captions: CaptionSpec | None = None

    @property
    def arrays(self) -> Mapping[str, RowArray]:
        return {"tokens": RowArray("int32", (self.length,)), "used": RowArray("int32")}

    @property
    def expected(self) -> str:
        where = " or ".join(self.captions.members) if self.captions else "txt, or caption in json"
        return f"a caption ({where})"

    def row(self, members: Mapping[str, bytes], tokenizer: Tokenizer | None, draw: int | None) -> TextRow:
        assert tokenizer is not None
        caption, choice = pick_caption(members, draw, self.captions)
        tokens, used = caption_row(tokenizer, caption, self.length)
        return TextRow({"tokens": tokens, "used": used}, choice, caption)

    def dummy(self, tokenizer: Tokenizer | None) -> Mapping[str, np.ndarray | float]:
        """An empty caption. A row of padding alone would be NaN under an attention mask."""
        assert tokenizer is not None
        tokens, used = caption_row(tokenizer, "", self.length)
        return {"tokens": tokens, "used": used}

    def mistakes(self) -> Iterator[str]:
        if self.length < 3:
            yield f"length is {self.length}; a start token, a caption and an end token need at least 3"


@dataclass(frozen=True)
class PackedFormat(TextFormat):
    """Sequences of `length` tokens written beforehand (prepare/pack.py): uint16 or uint32 in the member `npy`."""

    length: int
    tokenizer = None
    random = False
    slice_rows = 256  # a packed row takes microseconds, an image row milliseconds

    @property
    def arrays(self) -> Mapping[str, RowArray]:
        return {"tokens": RowArray("int32", (self.length,)), "used": RowArray("int32")}

    @property
    def expected(self) -> str:
        return f"npy with {self.length} packed tokens"

    def row(self, members: Mapping[str, bytes], tokenizer: Tokenizer | None, draw: int | None) -> TextRow:
        if "npy" not in members:
            raise ContentError("missing tokens", f"members: {', '.join(members) or 'none'}")
        try:
            tokens = read_npy(members["npy"])
        except ValueError as error:
            raise ContentError("undecodable", str(error)) from error
        if tokens.ndim != 1 or tokens.dtype not in (np.dtype(np.uint16), np.dtype(np.uint32)):
            shape = list(tokens.shape)
            raise UserError(f"{tokens.dtype} {shape}; packed text is uint16 or uint32 of one dimension")
        if len(tokens) != self.length:
            raise UserError(f"{len(tokens)} tokens, but text.length is {self.length}; make them equal")
        return TextRow({"tokens": tokens.astype(np.int32), "used": self.length})

    def dummy(self, tokenizer: Tokenizer | None) -> Mapping[str, np.ndarray | float]:
        """One token: no row of weight 1 is shorter."""
        return {"tokens": np.zeros(self.length, np.int32), "used": min(1, self.length)}

    def mistakes(self) -> Iterator[str]:
        if self.length < 1:
            yield f"length is {self.length}; it must be at least 1 token"


class RowCheck:
    """Compares what a format gives for a row with the arrays that it promised. Made once: a row takes microseconds.

    A wrong shape would be repeated by numpy, and a value out of range would become another one, without a word.
    """

    def __init__(self, text: TextFormat) -> None:
        self._text, self._promised = text, dict(text.arrays)
        self._exact = {name: (np.dtype(array.dtype), array.shape) for name, array in self._promised.items()}
        self._ranges = {
            name: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
            for name, (dtype, shape) in self._exact.items()
            if dtype.kind in "iu" and shape == ()
        }

    def arrays(self, given: Mapping[str, np.ndarray | float]) -> Mapping[str, np.ndarray | float]:
        """The values of a row in the promised types. Raises UserError if they are something else."""
        if given.keys() != self._promised.keys():
            raise UserError(
                f"the text format {_name(self._text)} gave the arrays {', '.join(given) or 'none'}; it says "
                f"{', '.join(self._promised) or 'none'}"
            )
        if all(self._fits(name, value) for name, value in given.items()):
            return given
        return {
            name: _checked(self._text, name, given[name], array) for name, array in self._promised.items()
        }

    def _fits(self, name: str, value: np.ndarray | float) -> bool:
        """Whether a value is exactly what was promised, as far as a quick look tells."""
        if type(value) is np.ndarray:
            return (value.dtype, value.shape) == self._exact[name]
        if type(value) is int and name in self._ranges:
            low, high = self._ranges[name]
            return low <= value <= high
        return False


def _checked(text: TextFormat, name: str, value: np.ndarray | float, array: RowArray) -> np.ndarray:
    found = np.asarray(value)
    if found.shape == array.shape:
        if found.dtype == array.dtype:
            return found
        kinds = found.dtype.kind, np.dtype(array.dtype).kind
        with np.errstate(invalid="ignore"):  # NaN as an integer: compared below
            cast = found.astype(array.dtype) if kinds[0] in "biuf" else found
        # A float may lose digits; any other value must stay the same.
        if kinds[0] in "biuf" and (kinds == ("f", "f") or np.array_equal(cast, found)):
            return cast
    which = ", which does not hold these values" if found.shape == array.shape else ""
    raise UserError(
        f"the text format {_name(text)} gave {found.dtype} {list(found.shape)} for the array {name!r}; it says "
        f"{array.dtype} {list(array.shape)}{which}"
    )


def failure_of(text: TextFormat, error: Exception) -> str:
    """What to say of an error that a format should not have raised."""
    return f"the text format {_name(text)} failed: {type(error).__name__}: {error}"


def _name(text: TextFormat) -> str:
    return f"{type(text).__module__}.{type(text).__qualname__}"


# The name of the caption format in the public interface of data_pipeline.
TextSpec = CaptionFormat


def read_npy(npy: bytes) -> np.ndarray:
    """The array of an npy file; never unpickles. Raises ValueError."""
    file = io.BytesIO(npy)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read(file)
    # numpy evaluates the header as Python, which can fail in any way, MemoryError included.
    except Exception as error:
        raise ValueError(f"invalid header: {type(error).__name__}: {error}") from error
    claimed, available = prod(shape) * dtype.itemsize, len(npy) - file.tell()
    if (
        claimed > available or min(shape, default=0) < 0
    ):  # numpy would take a negative size for all that is there
        raise ValueError(f"the header claims {claimed} bytes of {dtype}, the file has {available}")
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    # Not read_array, which would evaluate the header again: a third of the time of a packed row.
    array = np.frombuffer(npy, dtype, prod(shape), file.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")
