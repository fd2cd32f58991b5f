"""What is said about a failure, and its exit code: 2 for what the user must change before a run can work, else 1."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ReadError, UserError
from data_pipeline.storage.durable import write_errors
from data_pipeline.storage.files import publish
from pretrain.run.failures import LAST_WORDS, RunStopped, drop_unwritable_output, explain, say


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (errno.ENOSPC, "FILE: no space left on the disk (", 1),
        (errno.EDQUOT, "FILE: the disk quota is used up: make room there", 1),
        (errno.EFBIG, "FILE: over the limit on file sizes: raise it (ulimit -f)", 1),
        (errno.EMFILE, "FILE: Too many open files: raise the limit (ulimit -n)", 1),
        (errno.EIO, "FILE: Input/output error (DROMOS_TRACEBACK=1 prints the traceback)", 1),
        (errno.EROFS, "FILE: Read-only file system: make it writable, or choose another folder", 2),
        (errno.EACCES, "FILE: Permission denied: give this user write access, or choose another", 2),
        (errno.EPERM, "FILE: Operation not permitted: give this user write access, or choose another", 2),
        (errno.ENOMEM, "out of memory (", 1),
    ],
)
def test_an_error_of_the_system(tmp_path: Path, number: int, words: str, code: int) -> None:
    path = str(tmp_path / "file")
    failure = explain(OSError(number, os.strerror(number), path))
    assert failure is not None
    assert words.replace("FILE", path) in failure.message
    assert failure.code == code
    assert "\n" not in failure.message


@pytest.fixture
def anyone(tmp_path: Path) -> Iterator[Callable[[Callable[[], object]], str]]:
    """Runs an action as a user who is not root, and returns what is said about its error."""

    def told(action: Callable[[], object]) -> str:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                action()
            except OSError as error:
                failure = explain(error)
                os.write(writing, failure.message.encode() if failure is not None else b"a traceback")
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading) as file:
            text = file.read()
        os.waitpid(child, 0)
        return text

    folder = Path(tempfile.mkdtemp())  # tmp_path is closed to other users
    folder.chmod(0o755)
    (tmp_path / "open").symlink_to(folder)
    yield told
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_file_that_may_not_be_read_gets_no_advice_about_the_run_folder(
    tmp_path: Path, anyone: Callable[[Callable[[], object]], str]
) -> None:
    folder = (tmp_path / "open").resolve()
    closed = folder / "closed"
    closed.mkdir()
    for path in (folder / "00000.tar", closed / "00001.tar"):
        path.write_bytes(b"")
    (folder / "00000.tar").chmod(0)
    closed.chmod(0)
    advice = "give this user read access to it and to the folders above it"
    for path in (folder / "00000.tar", closed / "00001.tar"):
        assert anyone(path.open) == f"{path}: Permission denied: {advice}"
    assert anyone(lambda: os.listdir(closed)) == f"{closed}: Permission denied: {advice}"


def test_a_place_that_may_not_be_written_gets_advice_about_the_run_folder(
    tmp_path: Path, anyone: Callable[[Callable[[], object]], str]
) -> None:
    folder = (tmp_path / "open").resolve()
    (folder / "job.json").write_text("{}")
    folder.chmod(0o555)
    (folder / "job.json").chmod(0o444)
    advice = "give this user write access, or choose another folder (run.dir=NEW for a run)"
    assert (
        anyone(lambda: publish(folder / "job.json", b"")) == f"{folder}/job.json: Permission denied: {advice}"
    )
    assert anyone((folder / "run").mkdir) == f"{folder}/run: Permission denied: {advice}"


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (UserError("a recipe"), "a recipe", 2),
        (ReadError("a shard"), "a shard", 1),
        (RunStopped("a loss"), "a loss", 1),
        (MemoryError(), "out of memory: lower loader.workers", 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory (", 1),
        (RuntimeError("CUDA error: out of memory\nmore"), "out of GPU memory: CUDA error: out of memory Lower", 1),
    ],
)  # fmt: skip
def test_other_errors(error: Exception, message: str, code: int) -> None:
    failure = explain(error)
    assert failure is not None
    assert failure.message.startswith(message)
    assert failure.code == code


def raised(module: str, calls: dict[str, Any] | None = None) -> Exception:
    """An error raised in a function of a module of that name, below one of `calls`."""
    scope: dict[str, Any] = {"__name__": module, **(calls or {})}
    body = "below()" if calls else "raise RuntimeError('no such group')"
    exec(f"def step():\n    {body}\n", scope)
    try:
        scope["step"]()
    except RuntimeError as error:
        return error
    raise AssertionError


def called(module: str, inner: str) -> Exception:
    scope: dict[str, Any] = {"__name__": inner}
    exec("def below():\n    raise RuntimeError('no such group')\n", scope)
    return raised(module, {"below": scope["below"]})


def test_of_a_long_text_the_begin_is_told() -> None:
    text = "DefaultCPUAllocator: " + "".join(f"{number} " for number in range(1000))
    failure = explain(RuntimeError(f"\n {text}\nand more"))
    assert failure is not None
    assert failure.message.startswith(f"out of memory ({text[:400]} ...): lower loader.workers")
    failure = explain(RuntimeError(text[:400]))
    assert failure is not None
    assert failure.message.startswith(f"out of memory ({text[:400]}): lower loader.workers")


def test_only_an_error_inside_a_library_is_explained() -> None:
    for inner in ("deepspeed.runtime.engine", "torch.distributed.distributed_c10d"):
        failure = explain(called("pretrain.distributed.engine", inner))
        assert failure is not None
        assert failure.message.startswith(
            "RuntimeError when DeepSpeed updated the weights: no such group (DROMOS_"
        )
        failure = explain(called("pretrain.train.session", inner))
        assert failure is not None
        assert "in pretrain.train.session:2: no such group" in failure.message
    assert (
        explain(called("deepspeed.runtime.engine", "pretrain.models.clip")) is None
    )  # a bug of this project
    assert explain(called("pretrain.models.clip", "torch.nn.functional")) is None
    assert explain(raised("deepspeed.runtime.engine")) is None
    assert explain(KeyError("x")) is None


def test_a_failed_write_names_its_file(tmp_path: Path) -> None:
    for hidden in ("[enforce fail at inline_container.cc:671] . unexpected pos 12288 vs 12182", "other"):
        with pytest.raises((OSError, RuntimeError)) as found, write_errors(tmp_path / "step_2.tmp"):
            raise RuntimeError(hidden)
        assert isinstance(found.value, RuntimeError) == (hidden == "other")
    with pytest.raises(OSError, match="No space left") as named, write_errors("a/b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert named.value.filename == "a/b"
    with pytest.raises(OSError, match="No space left") as named, write_errors("a/b"):
        Path("/dev/full").write_text("x")
    assert named.value.filename == "a/b"
    text = 'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
    with pytest.raises(OSError, match="No space left") as named, write_errors("a/b"):
        raise ValueError(text)
    assert (named.value.errno, named.value.filename) == (errno.ENOSPC, "a/b")


def test_a_published_file_is_named_as_the_user_knows_it(tmp_path: Path) -> None:
    def full(file: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as named:
        publish(tmp_path / "job.json", full)
    assert named.value.filename == str(tmp_path / "job.json")
    assert list(tmp_path.iterdir()) == []


def test_the_last_words_reach_the_launcher_though_the_log_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    out, words = os.pipe()
    monkeypatch.setenv(LAST_WORDS, str(words))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stderr", full)
        say("the cause")
        monkeypatch.setattr("sys.stderr", None)
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        monkeypatch.undo()
        os.close(words)
        assert os.read(out, 100) == b"dromos: the cause\n"
        os.close(out)
        os.dup2(os.open("/dev/null", os.O_WRONLY), full.fileno())  # the file is closed without an error


def test_no_other_descriptor_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that a rank starts may have another file under the number."""
    with open(tmp_path / "file", "w") as file:
        monkeypatch.setenv(LAST_WORDS, str(file.fileno()))
        say("the cause")
    assert (tmp_path / "file").read_text() == ""


def test_a_message_on_the_pipe_is_cut_to_what_one_write_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setenv(LAST_WORDS, str(writer))
    say("x" * 5000)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"dromos: " + b"x" * (4096 - 8)  # PIPE_BUF: longer ones may interleave


def test_output_that_cannot_be_written_is_dropped(tmp_path: Path) -> None:
    """In a process of its own: its stdout is a full disk, its stderr a file."""
    lines = (
        "import os, sys; from pretrain.run.failures import drop_unwritable_output as drop; "
        "print('lost'); drop(); os.write(1, b'also lost'); "
    )
    with open("/dev/full", "wb") as full, (tmp_path / "errors").open("wb") as errors:
        code = subprocess.run(
            [sys.executable, "-c", lines + "print('kept', file=sys.stderr)"],
            stdout=full,
            stderr=errors,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        ).returncode
    assert (code, (tmp_path / "errors").read_text()) == (0, "kept\n")


@pytest.mark.parametrize("number", [1, 2])
def test_only_the_stream_that_fails_is_replaced(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    class Full:
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "full")

    replaced: list[tuple[str, int]] = []
    monkeypatch.setattr(sys, {1: "stdout", 2: "stderr"}[number], Full())
    monkeypatch.setattr(
        os, "dup2", lambda source, to: replaced.append((os.readlink(f"/proc/self/fd/{source}"), to))
    )
    before = set(os.listdir("/proc/self/fd"))
    drop_unwritable_output()
    assert replaced == [("/dev/null", number)]
    assert set(os.listdir("/proc/self/fd")) == before
