"""One rank of one training stage; the entry point that the launcher, srun and Ray call."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from data_pipeline.errors import ReadError, UserError
from pretrain.run.exit_codes import DONE, FAILED, RUN_AGAIN
from pretrain.run.failures import RunStopped, drop_unwritable_output, explain, print_traceback, say
from pretrain.run.folder import complete_steps

if TYPE_CHECKING:
    from pretrain.train.session import Session


def main(recipe_path: str, stage_name: str, overrides: Sequence[str] = ()) -> int:
    """Train `stage_name` to its end from its newest checkpoint; returns an exit code of pretrain/run/exit_codes.py."""
    from pretrain.train.stop_signals import StopFlag

    stop = StopFlag()  # before the slow imports: a signal during them must not be lost
    # Imports and setup create millions of objects that live as long as the process. Collections during them cost 15 %
    # of the start's processor time (docs/log.md). `Session.train` turns the collector on again.
    gc.disable()
    session: Session | None = None
    failed = False
    try:
        from pretrain.train.session import Session  # in the block: an import may lack memory

        session = Session(recipe_path, stage_name, overrides, stop)
        code = DONE if session.train() else RUN_AGAIN
    except Exception as error:
        failed = True
        code = _tell(error, session)
    finally:
        gc.enable()  # also after an error at the start
        closed = _close(session, tell=not failed)
    return code or closed


def _tell(error: Exception, session: Session | None) -> int:
    """Print what happened and what to do; returns the exit code. Raises an error that only its traceback explains."""
    failure = explain(error)
    if failure is None:
        raise error
    in_words = isinstance(error, UserError | RunStopped | ReadError)
    say(failure.message if in_words else failure.message + _kept(session))
    print_traceback(error)
    return failure.code


def _kept(session: Session | None) -> str:
    """The end of a message: what a resume starts from. Empty if the stage was not opened, or cannot be read."""
    if session is None:
        return ""
    try:
        steps = complete_steps(session.context.folder / "checkpoints")
    except OSError:
        return ""
    return (
        f"; the newest complete checkpoint, of step {steps[-1]}, is kept"
        if steps
        else "; no checkpoint is complete yet"
    )


def _close(session: Session | None, tell: bool) -> int:
    """Close the session; returns FAILED if its last writes fail. `tell`: print why."""
    try:
        if session is not None:
            session.close()
    except Exception as error:
        return _tell(error, session) if tell else FAILED
    return DONE


def exit_now(code: int) -> NoReturn:
    """Exit without Python's teardown. Call it only after all files are closed.

    During the teardown, threads of gloo and of its store have aborted ("terminate called without an active
    exception"), so that a finished rank looked like a failed one.
    """
    drop_unwritable_output()
    os._exit(code)
