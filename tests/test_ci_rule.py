"""CI's rule in tests/conftest.py: the skip of an integration test fails there, and nowhere else."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFTEST = "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport, shared\n"
TESTS = """
import pytest
integration = pytest.mark.integration

@integration
def test_marked(): pytest.skip("no slurmd")

@integration
@pytest.mark.skipif(True, reason="no slurmd")
def test_by_condition(): pass

def test_plain(): pytest.skip("not on Tuesdays")

@integration
def test_without_shared(): pytest.skip("needs ../shared, which is not here")

@integration
@pytest.mark.xfail(strict=True)
def test_expected_to_fail(): assert False

@integration
def test_passing(): pass
"""
MODULE = "import pytest\npytest.skip('no ray', allow_module_level=True)\n"


def outcomes(folder: Path, ci: str) -> dict[str, str]:
    """Test or file name -> the word pytest's summary says of it."""
    (folder / "integration").mkdir(parents=True)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS)
    (folder / "integration" / "test_module.py").write_text(MODULE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(folder), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)},
        cwd=folder,
    )
    found = {}
    for line in done.stdout.splitlines():
        name, _, rest = line.partition("::")[2].partition(" ")
        if name and rest.split() and name not in found:
            found[name] = rest.split()[0]
    found["module"] = "ERROR" if "ERROR integration/test_module.py" in done.stdout else "SKIPPED"
    if found["module"] == "ERROR":
        assert "no ray" in done.stdout
    return found


def test_a_skip_of_an_integration_test_fails_in_ci_only(tmp_path: Path) -> None:
    elsewhere = {
        "test_marked": "SKIPPED",
        "test_by_condition": "SKIPPED",
        "test_plain": "SKIPPED",
        "test_without_shared": "SKIPPED",
        "test_expected_to_fail": "XFAIL",
        "test_passing": "PASSED",
        "module": "SKIPPED",
    }
    assert outcomes(tmp_path / "elsewhere", "") == elsewhere
    in_ci = {"test_marked": "FAILED", "test_by_condition": "ERROR", "module": "ERROR"}
    assert outcomes(tmp_path / "ci", "true") == {**elsewhere, **in_ci}


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    """pytest's own default leaves out folders named dist and build, without a word."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert ROOT / "tests" / "dist" in folders
    names = {name for folder in folders for name in folder.relative_to(ROOT).parts}
    patterns = pytestconfig.getini("norecursedirs")
    assert not [name for name in names for pattern in patterns if fnmatch.fnmatch(name, pattern)]
