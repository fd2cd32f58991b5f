"""`dromos data index`, `show` and `view`: output with and without a terminal, and exit codes."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.tar import TarWriter
from data_pipeline.storage.files import publish_table
from launch.cli.data import app
from launch.cli.data_reports import ProgressLine
from pretrain.build.streams import stream_spec
from pretrain.recipe.sections.data import Stream
from tests.support.samples import encode, pixels

runner = CliRunner()


def picture(shard: int, index: int) -> bytes:
    """A JPEG of a size of its own; what follows its end mark is not read."""
    image = encode(pixels(shard, index, 8, 8), "JPEG")
    return image + bytes(1000 + 100 * index - len(image))


@pytest.fixture
def root(tmp_path: Path) -> str:
    for shard in range(3):
        with TarWriter(tmp_path / f"{shard}.tar") as tar:
            for index in range(10):
                tar.write(f"{shard}{index}", {"txt": b"word", "jpg": picture(shard, index)})
        rows = [{"key": f"{shard}{index}", "width": 10 * index} for index in range(11)]
        publish_table(tmp_path / f"{shard}.parquet", pa.Table.from_pylist(rows))
    return str(tmp_path)


def test_index_says_what_it_did(root: str) -> None:
    first = runner.invoke(app, ["index", root])
    assert first.exit_code == 0
    assert first.stdout.startswith(f"{root}: 3 shards (3 read, 0 unchanged), 30 samples, 0.1 MB; ")
    assert " MB/s, " in first.stdout
    assert " samples/s; " in first.stdout
    assert first.stdout.rstrip().endswith(open_source("a", root).fingerprint)
    assert first.stderr == ""
    again = runner.invoke(app, ["index", root, "--jobs", "2"])
    assert "(0 read, 3 unchanged), 30 samples" in again.stdout
    assert "MB/s" not in again.stdout


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{0..2}.tar"])
def test_file_urls_are_paths(root: str, pattern: str) -> None:
    url = f"file://{root}{pattern}"
    for arguments in (
        ["show", url],
        ["index", url],
        ["show", url],
        ["view", url, "--name", "wide", "--where", "width > 20"],
    ):
        done = runner.invoke(app, arguments)
        assert (done.exit_code, done.stderr) == (0, ""), arguments
    by_url, by_path = (open_source("a", at, "wide") for at in (url, root))
    assert by_url.fingerprint == by_path.fingerprint
    assert by_url.url(1) == f"{root}/1.tar"


@pytest.mark.parametrize("name", ["0_stats.json", "wids.json"])
def test_json_nested_without_end_is_told_or_passed_over(root: str, name: str) -> None:
    Path(root, name).write_text("[" * 200_000)
    done = runner.invoke(app, ["show", root])
    if name == "wids.json":
        assert done.exit_code == 0
    else:
        assert done.exit_code == 2
        assert f"{root}/{name} does not contain valid statistics" in done.output


def test_index_warns_of_duplicates(root: str) -> None:
    shutil.copy(f"{root}/1.tar", f"{root}/9.tar")
    done = runner.invoke(app, ["index", root])
    assert done.exit_code == 0
    assert "the same samples are in 1.tar, 9.tar; keep one of them" in done.stderr
    for shard in range(3, 9):
        shutil.copy(f"{root}/1.tar", f"{root}/{shard}.tar")
    many = runner.invoke(app, ["index", root])
    assert "are in 1.tar, 3.tar, 4.tar, 5.tar, 6.tar and 3 more; keep one of them" in many.stderr


def test_files_that_cannot_be_read_are_named(root: str) -> None:
    os.unlink(f"{root}/1.parquet")
    os.mkdir(f"{root}/1.parquet")
    used = f"dromos: cannot open {root}: Is a directory; fix it and run again\n"
    odd = f"dromos: {root}/1.parquet is not a regular file; remove it, or narrow the pattern\n"
    for arguments, code, said in (
        (["show", root, "--html", root], 1, used),
        (["view", root, "--name", "a", "--where", "width > 3"], 2, odd),
        (["view", root, "--name", "a", "--ids", root], 1, used),
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == code, arguments
        assert done.stderr == said


def test_an_index_without_offsets_and_a_broken_view_are_told(root: str) -> None:
    runner.invoke(app, ["index", root])
    runner.invoke(app, ["view", root, "--name", "wide", "--where", "width > 20"])
    assert runner.invoke(app, ["show", root]).exit_code == 0
    (offsets,) = Path(root, "_index").glob("offsets-*")
    offsets.unlink()
    Path(root, "_index", "views", "wide.parquet").write_bytes(b"")
    done = runner.invoke(app, ["show", root])
    assert done.exit_code == 2
    assert f"problem: {offsets} is gone" in done.stdout
    assert f"run: dromos data index {root}" in done.stdout
    assert f"note: {root}/_index/views/wide.parquet is not a valid view" in done.stdout
    assert runner.invoke(app, ["index", root]).exit_code == 0
    assert runner.invoke(app, ["show", root]).exit_code == 0


def test_a_cut_tar_is_told_once(root: str) -> None:
    os.truncate(f"{root}/1.tar", 3000)
    done = runner.invoke(app, ["show", root])
    assert done.exit_code == 2
    assert done.stdout.count("1.tar is cut off") == 1


def test_names_of_files_do_not_command_the_terminal(root: str) -> None:
    hostile = Path(root, "9\x1b]0;title\x07\x1b[2J.tar")
    shutil.copy(f"{root}/1.tar", hostile)
    done = runner.invoke(app, ["index", root])
    assert done.exit_code == 0
    assert r"the same samples are in 1.tar, 9\x1b]0;title\x07\x1b[2J.tar" in done.stderr
    hostile.write_bytes(b"")
    refused = runner.invoke(app, ["index", root])
    assert refused.exit_code == 2
    assert r"9\x1b]0;title\x07\x1b[2J.tar is empty" in refused.stderr
    shown = runner.invoke(app, ["show", root])
    assert shown.exit_code == 2
    for output in (done.output, refused.output, shown.output):
        assert not set(output) & {"\x1b", "\x07"}


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        with ProgressLine("data") as progress:
            progress(1, 2, 1000, 10**6)
            progress(2, 2, 2000, 2 * 10**6)
        shown = stream.getvalue()
        assert ("data: 2 of 2 shards, 2,000 samples, " in shown) == stream.isatty()
        assert "\n" not in shown
        assert bool(shown) == stream.isatty()


def test_a_view_is_made_and_a_recipe_uses_it(root: str) -> None:
    done = runner.invoke(app, ["view", root, "--name", "wide", "--where", "width >= 70"])
    assert done.exit_code == 0, done.output
    assert (
        "view wide keeps 9 of 30 samples; 12 rows match, 3 of them in no tar; 0 samples have no row"
        in done.stdout
    )
    stream = Stream.model_validate(
        {
            "sources": {"a": {"path": root, "view": "wide"}},
            "text": {"format": "packed", "length": 4},
            "batch": 3,
        }
    )
    source = stream_spec("text", stream, 0, "stage").sources["a"]
    assert open_source("a", source.path, source.view).samples == 9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--where", "width >"], "ends too early, at character 8"),
        (["--where", "wide > 3"], "no column 'wide', did you mean width"),
        ([], "either a filter"),
        (["--ids", "nowhere.txt"], "nowhere.txt does not exist"),
    ],
)
def test_what_is_wrong_is_named(root: str, flags: list[str], message: str) -> None:
    done = runner.invoke(app, ["view", root, "--name", "v", *flags])
    assert done.exit_code == 2
    assert message in done.stderr
