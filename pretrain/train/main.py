"""One rank of one training stage; the entry point that the launcher, srun and Ray call."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from data_pipeline.errors import ReadError, UserError
from pretrain.run.exit_codes import DONE, FAILED, RUN_AGAIN, USER_ERROR


def main(recipe_path: str, stage_name: str, overrides: Sequence[str] = ()) -> int:
    """Train `stage_name` to its end from its newest checkpoint; returns an exit code of pretrain/run/exit_codes.py."""
    from pretrain.train.stop_signals import StopFlag

    stop = StopFlag()  # before the slow imports: a signal during them must not be lost
    # Imports and setup create millions of objects that live as long as the process. Collections during them cost 15 %
    # of the start's processor time (docs/log.md). `Session.train` turns the collector on again.
    gc.disable()
    from pretrain.train.bad_samples import TooManyBadSamples
    from pretrain.train.non_finite import NonFinite
    from pretrain.train.session import Session
    from pretrain.train.trainer import UnreadableData

    session: Session | None = None
    try:
        session = Session(recipe_path, stage_name, overrides, stop)
        return DONE if session.train() else RUN_AGAIN
    except UserError as error:
        print(f"dromos: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except (NonFinite, TooManyBadSamples, UnreadableData, ReadError) as error:
        print(f"dromos: {error}", file=sys.stderr, flush=True)
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"dromos: {where}{error.strerror or error}; the newest complete checkpoint is kept",
            file=sys.stderr,
            flush=True,
        )
        return FAILED
    finally:
        gc.enable()  # also after an error at the start
        if session is not None:
            session.close()


def exit_now(code: int) -> NoReturn:
    """Exit without Python's teardown. Call it only after all files are closed.

    During the teardown, threads of gloo and of its store have aborted ("terminate called without an active
    exception"), so that a finished rank looked like a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
