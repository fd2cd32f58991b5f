"""One rank of one training stage: what the launcher, srun and Ray start."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from data_pipeline.errors import ReadError, UserError
from pretrain.run.exit_codes import DONE, FAILED, GO_ON, USER_ERROR


def main(recipe_path: str, stage_name: str, overrides: Sequence[str] = ()) -> int:
    """Train `stage_name` to its end, resuming by itself; returns the exit code (0, 2, 75 or 1)."""
    from pretrain.train.stop_flag import StopFlag

    stop = StopFlag()  # before the slow imports: a signal during them must not be lost
    from pretrain.train.bad_samples import TooManyBad
    from pretrain.train.session import Session
    from pretrain.train.trainer import NonFinite, Unreadable

    session: Session | None = None
    try:
        session = Session(recipe_path, stage_name, overrides, stop)
        return DONE if session.train() else GO_ON
    except UserError as error:
        print(f"dromos: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except (NonFinite, TooManyBad, Unreadable, ReadError) as error:
        print(f"dromos: {error}", file=sys.stderr, flush=True)
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"dromos: {where}{error.strerror or error}; the newest complete checkpoint stays",
            file=sys.stderr,
            flush=True,
        )
        return FAILED
    finally:
        if session is not None:
            session.close()


def leave(code: int) -> NoReturn:
    """End a rank's process at once: everything is written and closed.

    The interpreter's teardown is skipped because threads of gloo and of the store have been seen to abort in it
    ("terminate called without an active exception"), which made a finished rank look like a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
