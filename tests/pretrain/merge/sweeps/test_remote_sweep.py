"""Sweeps and soups into an object store: outputs, scores and files equal those on a disk, also after a kill."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline import storage
from data_pipeline.errors import UserError
from launch.cli.app import app
from pretrain.merge import open_weights, sweep
from pretrain.merge.output import remote as remote_output
from pretrain.merge.planning.planner import prepare
from pretrain.merge.planning.request import make_request
from pretrain.merge.sweeps import scored_sweep, workspace
from pretrain.merge.sweeps.results import Sweep
from pretrain.merge.sweeps.scored_sweep import run_sweep
from pretrain.merge.sweeps.scoring import parse_command
from pretrain.merge.sweeps.soup import Soup, run_soup
from pretrain.merge.sweeps.sweep import plan_sweep
from pretrain.merge.verify.check_output import verify
from tests.pretrain.merge.output.test_remote import uploads
from tests.support.merge_inputs import floats, write
from tests.support.s3_server import s3_server, upload
from tests.support.scorers import calls, scorer

BETAS = [0.0, 0.25, 0.5, 1.0]


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


@pytest.fixture
def store(root: str, request: pytest.FixtureRequest) -> str:
    """A folder in the bucket for one test."""
    return f"{root}/{request.node.name.replace('[', '-').rstrip(']')}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder; the working directory is the one of the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    for name, first, seed in (("a", 3.0, 1), ("b", -1.0, 2)):
        w = floats(seed, 50, 3)
        w[0, 0] = first
        write(tmp_path / name, {"w": w, "h": floats(seed + 5, 7)})
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path / "a"), str(tmp_path / "b")


def tree(url: str) -> dict[str, bytes]:
    """name -> content of the files below a folder, on a disk or in the store, without locks."""
    if not storage.is_remote(url):
        found = {p.relative_to(url).as_posix(): p.read_bytes() for p in Path(url).rglob("*") if p.is_file()}
    else:
        files = storage.filesystem(url)
        files.invalidate_cache()
        below = url.partition("://")[2] + "/"
        found = {path.removeprefix(below): files.cat_file(path) for path in files.find(url)}
    return {name: data for name, data in found.items() if not name.endswith(".lock")}


def run(pair: tuple[str, str], out: str, body: str | None = None, **options: Any) -> Sweep:
    betas = options.pop("betas", BETAS)
    plans, opened = plan_sweep(*pair, betas)
    command = parse_command(scorer(Path(), body), "--eval-cmd") if body is not None else None
    return run_sweep(plans, opened, betas, out, command, **options)


PEAK = "print(json.dumps({'acc': 1 - (x - 1) ** 2}))"


def test_outputs_are_those_of_a_disk_read_once_for_all(pair: tuple[str, str], store: str, here: Path) -> None:
    result = sweep(*pair, BETAS, f"{store}/s")
    assert result == {beta: f"{store}/s/beta-{beta:.2f}" for beta in BETAS}
    sweep(*pair, BETAS, "s")
    assert tree(f"{store}/s") == tree("s")
    assert not any((here / f"dromos-{os.getuid()}").iterdir())
    report = verify(result[0.25])
    assert not report.wrong
    assert report.recomputed
    moved: list[int] = []
    sweep(*pair, BETAS, f"{store}/s", progress=moved.append)
    assert not moved
    sweep(*pair, [0.75], f"{store}/s", progress=moved.append)
    assert moved
    with pytest.raises(UserError, match=r"holds a sweep of other weights|has another merge"):
        sweep(*pair, [0.75], f"{store}/s", dtype="F16")


def test_inputs_on_the_store_are_read_once_for_all_betas(
    pair: tuple[str, str], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = [upload(Path(path), f"{store}/{Path(path).name}") for path in pair]
    sweep(remote[0], remote[1], BETAS, f"{store}/s")
    sweep(*pair, BETAS, "s")
    for beta in BETAS:
        name = f"s/beta-{beta:.2f}/model.safetensors"
        assert storage.read_bytes(f"{store}/{name}") == Path(name).read_bytes()


@pytest.mark.parametrize("keep", [True, False])
def test_scores_are_those_of_a_disk(pair: tuple[str, str], store: str, here: Path, keep: bool) -> None:
    """The command gets a local folder with the bytes that are in the store."""
    printed: list[str] = []
    remote = run(pair, f"{store}/s", PEAK, keep=keep, print_line=printed.append)
    scored = calls(Path())
    assert all(call.startswith(f"{here}/dromos-{os.getuid()}/") for call in scored)
    assert [Path(call).name for call in scored] == [f"beta-{beta:.2f}" for beta in BETAS]
    assert len(printed) == len(BETAS)
    local = run(pair, "s", PEAK, keep=keep)
    assert remote.lines() == local.lines()
    assert remote.best is not None
    assert remote.best.beta == 0.5
    assert tree(f"{store}/s") == tree("s")
    assert f"{store}/s/logs/beta-0.50.out" in [f"{store}/s/{name}" for name in tree(f"{store}/s")]
    assert not list((here / f"dromos-{os.getuid()}").iterdir())
    before = len(calls(Path()))
    run(pair, f"{store}/s", PEAK, keep=keep)
    assert len(calls(Path())) == before


def test_scores_after_the_outputs_were_kept(pair: tuple[str, str], store: str) -> None:
    run(pair, f"{store}/s")
    run(pair, f"{store}/s", PEAK)
    run(pair, "s", PEAK)
    assert tree(f"{store}/s") == tree("s")


def test_a_command_that_fails_leaves_its_log_and_the_scores(
    pair: tuple[str, str], store: str, here: Path
) -> None:
    fails = "sys.exit('no data') if x > 0.5 and not os.path.exists('fixed') else print(x)"
    with pytest.raises(UserError, match="exit code 1; see ") as error:
        run(pair, f"{store}/s", fails, keep=False)
    log = Path(str(error.value).partition("; see ")[2].partition("\n")[0])
    assert log.read_text().strip() == "no data"
    scores = json.loads(storage.read_bytes(f"{store}/s/sweep.json"))["betas"]
    assert [entry["figures"] is not None for entry in scores] == [True, True, False, False]
    Path("fixed").touch()
    run(pair, f"{store}/s", fails, keep=False)
    assert len(calls(Path())) == len(BETAS) + 1
    assert not log.exists()


@pytest.mark.parametrize("where", ["write", "publish", "score", "save"])
def test_a_killed_sweep_resumes(
    pair: tuple[str, str], store: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Killed at the second call of a function, without any clean-up: the next process resumes from what it finds."""
    target, name = {
        "write": (remote_output.Uploads, "write"), "publish": (remote_output.Uploads, "publish"),
        "score": (workspace.Workspace, "score"), "save": (scored_sweep, "_save"),
    }[where]  # fmt: skip
    real, seen = getattr(target, name), []

    def killed(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, killed)
        patch.setattr(remote_output.Uploads, "stop", lambda self, abort_uploads: None)
        with pytest.raises(KeyboardInterrupt):
            run(pair, f"{store}/s", PEAK)
    for path in tree(f"{store}/s"):
        assert not path.endswith(".safetensors") or f"{path.rpartition('/')[0]}/merge.json" in tree(
            f"{store}/s"
        )
    run(pair, f"{store}/s", PEAK)
    run(pair, "s", PEAK)
    assert tree(f"{store}/s") == tree("s")
    assert uploads(store) == []


def test_two_sweeps_at_once_on_this_machine(pair: tuple[str, str], store: str) -> None:
    plans, opened = plan_sweep(*pair, BETAS)
    keys = [plan.key([source.hashes() for source in opened.sources]) for plan in plans]
    with (
        workspace.Workspace(f"{store}/s", "\n".join(keys)),
        pytest.raises(UserError, match="is being written by pid"),
    ):
        run(pair, f"{store}/s")


def test_a_temporary_folder_of_another_user_is_refused(pair: tuple[str, str], store: str, here: Path) -> None:
    (here / "elsewhere").mkdir()
    (here / f"dromos-{os.getuid()}").symlink_to(here / "elsewhere")
    with pytest.raises(UserError, match="set TMPDIR to another folder"):
        run(pair, f"{store}/s")


def soup(pair: list[str], out: str, body: str | None, **options: Any) -> Soup:
    merge_request = make_request(pair, method="soup")
    _, opened = prepare(merge_request)
    command = parse_command(scorer(Path(), body), "--score-cmd") if body is not None else None
    return run_soup(merge_request, opened, out, command, **options)


@pytest.fixture
def three(pair: tuple[str, str], tmp_path: Path) -> list[str]:
    w = floats(9, 50, 3)
    w[0, 0] = 40.0
    write(tmp_path / "c", {"w": w, "h": floats(8, 7)})
    return [*pair, str(tmp_path / "c")]


@pytest.mark.parametrize("inputs", ["local", "remote"])
def test_a_soup_is_that_of_a_disk(three: list[str], store: str, here: Path, inputs: str) -> None:
    remote = three if inputs == "local" else [upload(Path(p), f"{store}/{Path(p).name}") for p in three]
    result = soup(remote, f"{store}/soup", PEAK)
    assert result.chosen == (0, 1)
    soup(three, "soup", PEAK)
    there, disk = tree(f"{store}/soup"), tree("soup")
    assert there["model.safetensors"] == disk["model.safetensors"]
    assert set(there) == set(disk)
    assert {"soup.json", "merge.json", "logs/A-B.out"} <= set(there)
    if inputs == "local":
        assert there == disk
    assert tree(f"{store}/soup.trials") == {}
    assert not list((here / f"dromos-{os.getuid()}").iterdir())
    before = len(calls(Path()))
    soup(remote, f"{store}/soup", PEAK)
    assert len(calls(Path())) == before
    with pytest.raises(UserError, match="of other models or options"):
        soup([*reversed(remote)], f"{store}/soup", PEAK)


def test_a_uniform_soup_and_one_of_a_folder_that_is_taken(three: list[str], store: str) -> None:
    soup(three, f"{store}/mean", None, uniform=True)
    soup(three, "mean", None, uniform=True)
    assert tree(f"{store}/mean") == tree("mean")
    storage.publish(f"{store}/taken/notes.txt", b"keep me")
    with pytest.raises(UserError, match="taken exists and is not the output of a soup"):
        soup(three, f"{store}/taken", PEAK)
    assert calls(Path()) == []


@pytest.mark.parametrize("where", ["score", "upload", "publish"])
def test_a_killed_soup_resumes(
    three: list[str], store: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    name, call = {
        "score": ("pretrain.merge.sweeps.workspace.Workspace.score", 3),
        "upload": ("pretrain.merge.output.remote.Uploads.publish", 1),
        "publish": ("pretrain.merge.sweeps.soup._Search.publish", 1),
    }[where]
    module, _, attribute = name.rpartition(".")
    owner = {"Workspace": workspace.Workspace, "Uploads": remote_output.Uploads}.get(
        module.rpartition(".")[2]
    )
    if owner is None:
        from pretrain.merge.sweeps.soup import _Search as owner  # type: ignore[assignment]
    real, seen = getattr(owner, attribute), []

    def killed(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, killed)
        with pytest.raises(KeyboardInterrupt):
            soup(three, f"{store}/soup", PEAK)
    scored = len(calls(Path()))
    soup(three, f"{store}/soup", PEAK)
    assert len(calls(Path())) == (5 if where == "score" else scored)
    soup(three, "soup", PEAK)
    assert tree(f"{store}/soup") == tree("soup")
    assert tree(f"{store}/soup.trials") == {}
    assert uploads(store) == []


def test_diff_and_interpolation_of_what_a_sweep_left(pair: tuple[str, str], store: str) -> None:
    result = sweep(*pair, [0.5], f"{store}/s")
    local = sweep(*pair, [0.5], "s")
    assert open_weights(result[0.5]).array("w").tobytes() == open_weights(local[0.5]).array("w").tobytes()


def test_the_commands(three: list[str], store: str) -> None:
    swept = CliRunner().invoke(app, ["sweep", *three[:2], "--betas", "0,1", "--out", f"{store}/s"])
    assert swept.exit_code == 0, swept.output
    assert f"beta 1: {store}/s/beta-1.00" in swept.stdout
    scored = ["--score-cmd", scorer(Path(), PEAK), "--out", f"{store}/soup"]
    cooked = CliRunner().invoke(app, ["soup", *three, *scored])
    assert cooked.exit_code == 0, cooked.output
    assert f"written: {store}/soup" in cooked.stdout
    assert "already complete" in CliRunner().invoke(app, ["soup", *three, *scored]).stdout
    typo = CliRunner().invoke(app, ["soup", *three, "--uniform", "--out", store.replace("//", "/")])
    assert typo.exit_code == 2
    assert "write s3://BUCKET/FOLDER" in typo.output
    bare = CliRunner().invoke(app, ["soup", *three, "--uniform", "--out", "s3://bucket"])
    assert "give a folder in the bucket" in bare.output
    before = len(calls(Path()))
    to = ["--out", "s3://nowhere-at-all/s"]
    for words in (["sweep", *three[:2]], ["sweep", *three[:2], "--no-keep", "--eval-cmd", scored[1]]):
        missing = CliRunner().invoke(app, [*words, *to])
        assert missing.exit_code == 2
        assert "the bucket, or correct its name" in missing.output.replace("\n", " ")
    missing = CliRunner().invoke(app, ["soup", *three, *scored[:2], *to])
    assert missing.exit_code == 2
    assert "the bucket, or correct its name" in missing.output
    assert len(calls(Path())) == before
