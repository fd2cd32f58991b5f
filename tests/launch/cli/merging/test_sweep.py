"""`dromos sweep` from the command line."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from launch.cli.base import group
from launch.cli.merging import sweep
from tests.support import commands
from tests.support.merge_inputs import floats, write
from tests.support.scorers import calls, scorer


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write(tmp_path / name, {"w": floats(seed, 4, 3), "head": floats(seed + 5, 2)})
    return "./a", "./b"


def dromos(*words: str) -> Result:
    app = group("test")
    sweep.register(app)
    app.command(name="other")(lambda: None)  # a group of one command would take no name
    return CliRunner().invoke(app, list(words))


def test_outputs(pair: tuple[str, str]) -> None:
    result = dromos("sweep", *pair, "--betas", "0:1:0.5", "--out", "s")
    assert result.exit_code == 0, result.output
    assert "beta 0.5: s/beta-0.50" in result.output
    for beta, parent in (("0.00", "b"), ("1.00", "a")):
        got, want = load_file(f"s/beta-{beta}/model.safetensors"), load_file(f"{parent}/model.safetensors")
        assert all(got[n].tobytes() == want[n].tobytes() for n in want)
    assert "already complete" in dromos("sweep", *pair, "--betas", "0:1:0.5", "--out", "s").output


def test_inputs_that_were_swapped_are_told(pair: tuple[str, str]) -> None:
    assert dromos("sweep", *pair, "--betas", "0,1", "--out", "s").exit_code == 0
    swapped = dromos("sweep", *pair[::-1], "--betas", "0,1", "--out", "s")
    assert swapped.exit_code == 2
    assert "(beta 0), where A is ./a and B is ./b; choose another --out" in swapped.output


def dromos_with_open_files(hard: int, *words: str) -> None:
    """Run a command whose process may open 128 files, and may raise this limit to `hard`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    commands.dromos(*words)


@pytest.mark.parametrize(("hard", "betas"), [(4096, 51), (256, 0)])
def test_many_betas_raise_the_limit_of_open_files(pair: tuple[str, str], hard: int, betas: int) -> None:
    words = ("sweep", *pair, "--betas", "0:1:0.02", "--out", "s")
    command = commands.Command(__name__, "dromos_with_open_files", (hard, *words), Path.cwd(), os.environ)
    _, errors = command.communicate()
    assert len(list(Path("s").glob("beta-*/model.safetensors"))) == betas
    assert ("353 files would be open at once, and the limit is 256" in errors) is not bool(betas)


def test_scores_are_a_table_and_files(pair: tuple[str, str]) -> None:
    words = ("sweep", *pair, "--betas", "0:1:0.5", "--out", "s", "--no-keep", "--lower-is-better")
    result = dromos(*words, "--eval-cmd", scorer(Path(), "print(abs(x))"), "--timeout", "60")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["beta", "score"]
    assert [row[0] for row in rows[1:4]] == ["0", "0.5", "1"]
    assert rows[1][-2:] == ["B:", "./b"]
    assert rows[3][-2:] == ["A:", "./a"]
    assert sum("best" in row for row in rows) == 1
    assert {p.name for p in Path("s").iterdir()} >= {"sweep.json", "sweep.csv", "sweep.svg", "logs"}
    assert not list(Path("s").glob("beta-*"))


@pytest.mark.parametrize("words", [["--metric", "top1"], ["--lower-is-better"], ["--timeout", "9"]])
def test_how_to_take_a_score_without_a_command_that_makes_one(
    pair: tuple[str, str], words: list[str]
) -> None:
    result = dromos("sweep", *pair, "--betas", "0.5", "--out", "s", *words)
    assert result.exit_code == 2
    assert f"{words[0]}: only for scores, and nothing is scored; add --eval-cmd" in result.output
    assert not Path("s").exists()


def test_a_command_that_fails_is_one_message(pair: tuple[str, str]) -> None:
    result = dromos("sweep", *pair, "--betas", "0.5", "--out", "s", "--eval-cmd", "sh -c 'exit 4; {}'")
    assert result.exit_code == 2
    assert "exit code 4; see s/logs/beta-0.50.err" in result.output
    assert "Traceback" not in result.output


def test_a_dry_run_writes_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    result = dromos("sweep", *pair, "--dry-run", "--out", "s")
    assert result.exit_code == 0
    assert "This is the plan for beta 0.5. The 11 betas are written to: beta-0.00" in result.output
    assert result.output.endswith(f"writes {11 * Path('a/model.safetensors').stat().st_size:,} bytes\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--betas", "0:2:1", "--out", "x"), "not between 0 and 1"),
        (("--betas", "0,1"), "--out DIR is missing"),
        (("--out", "x", "--no-keep"), "--eval-cmd"),
        (("--out", "x", "--eval-cmd", "python eval.py"), "write {}"),
        (("--out", "x", "--eval-cmd", "nowhere-to-be-found {}"), "no such program"),
        (("--out", "x", "--method", "ties"), "linear or slerp"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    pair: tuple[str, str], tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    result = dromos("sweep", *pair, *words)
    assert result.exit_code == 2
    assert why in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_help_says_what_beta_means() -> None:
    text = " ".join(dromos("sweep", "--help").output.split())
    assert "theta = beta * A + (1 - beta) * B" in text
    assert "Exit codes:" in text


def test_after_a_kill_nothing_goes_on_alone_and_the_next_run_does(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    body = (
        "open('pid.part', 'w').write(str(os.getpid()))\n"
        "if 'beta-0.50' in folder and not os.path.exists('go'):\n"
        "    os.rename('pid.part', 'pid')\n"
        "    import time; time.sleep(60)\n"
        "print(x)\n"
    )
    command = scorer(Path(), body)
    words = ("sweep", *pair, "--betas", "0:1:0.25", "--out", "s", "--no-keep", "--eval-cmd", command)
    process = commands.start(*words)
    assert _soon(lambda: Path("pid").exists())
    process.kill()
    process.wait()
    scoring = Path("/proc") / Path("pid").read_text()
    assert _soon(lambda: not scoring.exists() or ") Z " in (scoring / "stat").read_text())
    Path("go").write_text("")
    result = dromos(*words)
    assert result.exit_code == 0, result.output
    tried = [Path(call).name for call in calls(Path())]
    assert tried == ["beta-0.00", "beta-0.25", "beta-0.50", "beta-0.50", "beta-0.75", "beta-1.00"]
    assert not [path for path in Path("s").iterdir() if "beta" in path.name]


def _soon(true: Callable[[], bool]) -> bool:
    for _ in range(600):
        if true():
            return True
        time.sleep(0.05)
    return False
