"""Reference implementation of binary float formats and safetensors files in plain Python, for tests of merges.

It rounds with integers and uses struct for files, so it shares no code with numpy or the merge tool.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

Model = dict[str, list[int]]  # tensor name -> bits of its elements


@dataclass(frozen=True)
class Format:
    """A binary floating-point format.

    size:      bytes per number.
    precision: bits of the significand, the hidden one included.
    bias:      of the exponent, which is also the largest exponent.
    """

    size: int
    precision: int
    bias: int

    def rounded(self, value: float | Fraction) -> float:
        """`value` rounded to the format: to nearest, ties to even. Exact, because fp64 contains every format here."""
        if isinstance(value, float) and (not math.isfinite(value) or value == 0):
            return value
        exponent = math.frexp(float(value))[1]
        ulp = max(exponent, 2 - self.bias) - self.precision
        exact = Fraction(value) / Fraction(2) ** ulp
        whole = round(exact)  # half to even
        if abs(whole) * Fraction(2) ** ulp >= 2 ** (self.bias + 1):
            return math.copysign(math.inf, value)
        return math.copysign(math.ldexp(whole, ulp), value)

    def decode(self, bits: int) -> float:
        fraction = self.precision - 1
        low, high = bits & ((1 << fraction) - 1), bits >> fraction & (2 * self.bias + 1)
        sign = -1.0 if bits >> (self.size * 8 - 1) else 1.0
        if high == 2 * self.bias + 1:
            return math.nan if low else sign * math.inf
        whole = low + (1 << fraction) if high else low
        return sign * math.ldexp(whole, max(high, 1) - self.bias - fraction)

    def encode(self, value: float) -> int:
        """Bits of a number of the format; every NaN becomes the positive quiet NaN without payload."""
        fraction = self.precision - 1
        top = (2 * self.bias + 1) << fraction
        if math.isnan(value):
            return top | 1 << (fraction - 1)
        sign = (1 if math.copysign(1, value) < 0 else 0) << (self.size * 8 - 1)
        if math.isinf(value):
            return sign | top
        if abs(value) < math.ldexp(1.0, 1 - self.bias):
            return sign | int(Fraction(abs(value)) / Fraction(2) ** (1 - self.bias - fraction))
        mantissa, exponent = math.frexp(abs(value))
        low = int(math.ldexp(mantissa, self.precision)) - (1 << fraction)
        return sign | (exponent - 1 + self.bias) << fraction | low


FORMATS = {
    "F64": Format(8, 53, 1023),
    "F32": Format(4, 24, 127),
    "F16": Format(2, 11, 15),
    "BF16": Format(2, 8, 127),
}


def store(folder: Path, dtype: str, model: Model) -> str:
    size, header, data = FORMATS[dtype].size, {}, b""
    for name, bits in model.items():
        raw = b"".join(one.to_bytes(size, "little") for one in bits)
        places = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": [len(bits)], "data_offsets": places}
        data += raw
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(folder)


def load(folder: Path, dtype: str) -> Model:
    raw = (folder / "model.safetensors").read_bytes()
    length, size = struct.unpack("<Q", raw[:8])[0], FORMATS[dtype].size
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == dtype
            begin, end = (8 + length + place for place in entry["data_offsets"])
            found[name] = [int.from_bytes(raw[at : at + size], "little") for at in range(begin, end, size)]
    return found
