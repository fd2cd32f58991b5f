"""Builds of the compiled passes: other processors and flags give the same bits, or no build; sizes agree with C."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.merge.methods import native, task_vectors
from pretrain.weights import dtypes as kernels
from pretrain.weights.dtypes import DTYPES
from tests.support.merge_jobs import run

WORDS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
BASED = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native.compiled_function("products") is None:
        assert not os.environ.get("CI"), "CI has a compiler, so the passes must have been built"
        pytest.skip("the passes were not built: no compiler")


@pytest.mark.parametrize(
    "own",
    [
        ["-DCLONES="],
        ['-DCLONES=__attribute__((target("avx2")))'],
        ["-DCLONES=", "-ffast-math", "-march=native"],
    ],
)
def test_versions_for_other_processors_and_by_other_flags_have_the_same_bits(
    own: list[str], numpy_merges: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor picks the widest version, so the others are built alone. CFLAGS come before the project's flags."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no compiler, or another processor")
    if "avx2" in own[0] and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    root = Path(__file__).parents[4]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    module = next(m for m in project["tool"]["setuptools"]["ext-modules"] if m["name"].endswith("_passes"))
    sources = [str(root / name) for name in module["sources"]]
    built = str(tmp_path / "passes.so")
    options = [*own, "-shared", "-fPIC", *module["extra-compile-args"], *module["extra-link-args"]]
    subprocess.run([compiler, *options, *sources, "-o", built], check=True)
    library = ctypes.CDLL(built)
    calls: list[str] = []
    monkeypatch.setattr(
        native, "load_function", lambda _, __, name: calls.append(name) or getattr(library, name)
    )
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    assert merges_of_many_kinds() == numpy_merges
    assert calls


@pytest.fixture(scope="module")
def numpy_merges() -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "compiled_function", lambda *_: None)
        return merges_of_many_kinds()


def merges_of_many_kinds() -> list[bytes]:
    """Results of the methods with compiled passes, for every storage type of the inputs and of the output."""
    random, found = np.random.default_rng(0), []
    for stored in WORDS:
        bits = [random.integers(0, 2**64, 2500, np.uint64).astype(WORDS[stored]) for _ in range(3)]
        near = [kernels.narrow(np.ones(2500) + 0.01 * random.standard_normal(2500), stored) for _ in range(3)]
        for a, b, base in ([one.view(DTYPES[stored]) for one in bits], near):
            for method in ("linear", "slerp", *BASED):
                given: dict[str, Any] = {"block": 1777}
                if method in BASED:
                    given["base"] = base, stored
                if method in BASED[1:]:
                    given["densities"] = [0.3, 0.6]
                found += [
                    run(method, [a, b], [stored] * 2, [0.4, 0.6], out, **given).tobytes() for out in WORDS
                ]
    return found


def test_sizes_are_those_of_the_c_files() -> None:
    """Python allocates the memory that C fills, so both must agree on sizes."""
    folder = Path(native.__file__).parent / "csrc"
    numbers, products = ((folder / name).read_text() for name in ("numbers.h", "products.c"))
    assert f"enum {{ TILE = {native.ELEMENTS_PER_TILE} }};" in numbers
    assert f"enum {{ MOST = {native.MAX_VECTORS} }};" in products
    assert task_vectors.ELEMENTS_PER_KEY == 1 << 16
    assert "enum { LATTICE = 1 << 16 };" in (folder / "difference.c").read_text()


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast"])
def test_flags_that_change_rounding_do_not_build(flag: str) -> None:
    """The build fails, the optional extension is left out, and numpy computes the merge."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no compiler")
    source = str(Path(native.__file__).parent / "csrc/linear.c")
    failed = subprocess.run([compiler, flag, "-fsyntax-only", source], capture_output=True, text=True)
    assert failed.returncode
    assert "must be rounded to its own type" in failed.stderr
    subprocess.run([compiler, flag, "-fno-fast-math", "-O3", "-fsyntax-only", source], check=True)
