"""One line and an exit code for a failure that is no bug: full disk, unwritable folder, out of memory, DeepSpeed."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import ReadError, UserError
from pretrain.run.exit_codes import FAILED, USER_ERROR

# Set by the launcher: a pipe on which a rank repeats its last message, because its log may be on a full disk.
LAST_WORDS = "DROMOS_LAST_WORDS"
TRACEBACK = "DROMOS_TRACEBACK"  # 1: the traceback of an explained failure is printed too
MAX_DETAIL = 400

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
HOST_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory|std::bad_alloc")
GPU_MEMORY = re.compile(
    r"CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure.*out of memory"
)
CONNECTION = re.compile(
    r"[Cc]onnection (closed|reset|refused)|Broken pipe|Timed out|timed out|[Tt]imeout|remote process exited"
)
# What the functions of pretrain/distributed/engine.py do, for messages.
ENGINE_WORK = {
    "import_deepspeed": "DeepSpeed was imported",
    "join_process_group": "the ranks connected",
    "leave_process_group": "the ranks disconnected",
    "__init__": "DeepSpeed took the model over",
    "load": "DeepSpeed loaded the checkpoint",
    "save": "DeepSpeed saved a checkpoint",
    "accumulate": "DeepSpeed reduced the gradients",
    "backward": "DeepSpeed ran the backward pass",
    "step": "DeepSpeed updated the weights",
    "__call__": "DeepSpeed ran the forward pass",
}


class RunStopped(RuntimeError):
    """A run that stopped for a reason in its data or numbers; the message says what, where and what to do."""


@dataclass(frozen=True)
class Failure:
    """The message for the user, one line or a few, and the exit code (pretrain/run/exit_codes.py)."""

    message: str
    code: int


def explain(error: BaseException) -> Failure | None:
    """What to tell the user about an error; None for one that only a traceback explains."""
    if isinstance(error, UserError):
        return Failure(str(error), USER_ERROR)
    if isinstance(error, RunStopped | ReadError):
        return Failure(str(error), FAILED)
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        return _operating_system(error)
    text = str(error)
    if _is_gpu_memory(error, text):
        return Failure(
            f"out of GPU memory: {_short(text)} Lower train.micro_batch, which changes no result, or use more or "
            "larger GPUs",
            FAILED,
        )
    if isinstance(error, MemoryError | OSError) or HOST_MEMORY.search(text):
        detail = f" ({_short(text)})" if text else ""
        return Failure(
            f"out of memory{detail}: lower loader.workers or train.micro_batch, which change no result, or give the "
            "run more memory",
            FAILED,
        )
    return _library(error)


def say(message: str) -> None:
    """Print an error message on stderr and on the launcher's pipe. Never raises: the log may be on a full disk."""
    with suppress(OSError, ValueError):
        print(f"dromos: {message}", file=sys.stderr, flush=True)
    with suppress(OSError, ValueError, KeyError):
        descriptor = int(os.environ[LAST_WORDS])
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.write(descriptor, f"dromos: {message}\n".encode()[:4096])


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an explained failure if the user asked for it."""
    if os.environ.get(TRACEBACK) == "1":
        with suppress(OSError):
            traceback.print_exception(error)


def drop_unwritable_output() -> None:
    """Flush stdout and stderr; one that cannot be written (a full disk) is replaced by /dev/null.

    Otherwise Python would try again while it exits, print an error of its own and end with exit code 120.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)


def _operating_system(error: OSError) -> Failure:
    path = error.filename2 or error.filename
    where = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "the output of this process"
    what = error.strerror or str(error)
    again = "then run it again"
    if error.errno == errno.ENOSPC:
        return Failure(f"{where}: no space left on the disk{_free(where)}: make room there, {again}", FAILED)
    if error.errno == errno.EDQUOT:
        return Failure(f"{where}: the disk quota is used up: make room there, {again}", FAILED)
    if error.errno == errno.EFBIG:
        return Failure(f"{where}: over the limit on file sizes: raise it (ulimit -f), {again}", FAILED)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Failure(f"{where}: {what}: raise the limit (ulimit -n), {again}", FAILED)
    if error.errno in UNWRITABLE and path is not None:
        if error.errno == errno.EROFS:
            advice = "make it writable, or choose another folder (run.dir=NEW for a run)"
        elif _may_read(where):  # so it was to be written, or it is new
            advice = "give this user write access, or choose another folder (run.dir=NEW for a run)"
        else:
            advice = "give this user read access to it and to the folders above it"
        return Failure(f"{where}: {what}: {advice}", USER_ERROR)
    place = f"{where}: " if path is not None else ""
    return Failure(f"{place}{what} ({TRACEBACK}=1 prints the traceback)", FAILED)


def _may_read(where: str) -> bool:
    """True for a path that this user may read, also if it does not exist yet; False if a folder above it is closed."""
    try:
        os.stat(where)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return os.access(where, os.R_OK)


def _free(where: str) -> str:
    """` (0 bytes are free)`, of the disk of a path; empty if it cannot be read."""
    for folder in (Path(where), *Path(where).absolute().parents):
        with suppress(OSError):
            status = os.statvfs(folder)
            if status.f_files and not status.f_favail:
                return " (it has no free inodes)"
            return f" ({status.f_bavail * status.f_frsize:,} bytes are free)"
    return ""


def _is_gpu_memory(error: BaseException, text: str) -> bool:
    """Also for torch.OutOfMemoryError, which is a RuntimeError; torch is not imported here."""
    named = any(
        kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch")
        for kind in type(error).__mro__
    )
    return named or GPU_MEMORY.search(text) is not None


def _library(error: BaseException) -> Failure | None:
    """A failure inside DeepSpeed or torch.distributed; None for one in this project's own code."""
    frames = [
        (str(frame.f_globals.get("__name__")), frame.f_code.co_name, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    own = [
        place
        for place, (module, *_) in enumerate(frames)
        if module.startswith(("pretrain.", "data_pipeline."))
    ]
    if not own:
        return None
    below = [module for module, *_ in frames[own[-1] + 1 :]]
    if not any(module.startswith(("deepspeed", "torch.distributed")) for module in below):
        return None
    module, function, line = frames[own[-1]]
    work = ENGINE_WORK.get(function) if module == "pretrain.distributed.engine" else None
    text = _short(str(error)) or "no message"
    if CONNECTION.search(text):
        advice = (
            "another rank has ended or does not answer: the log of the rank that failed first has the cause"
        )
    else:
        advice = f"{TRACEBACK}=1 prints the traceback"
    when = f"when {work}" if work else f"in {module}:{line}"
    return Failure(f"{type(error).__name__} {when}: {text} ({advice})", FAILED)


def _short(text: str) -> str:
    """The first line with content, cut."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= MAX_DETAIL else line[:MAX_DETAIL] + " ..."
