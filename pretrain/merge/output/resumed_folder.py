"""`resumed_folder`: an output folder that appears when it is complete and resumes a killed merge from its journal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import (
    JOURNAL,
    check_space,
    clear_partial,
    locked_partial,
    publish_folder,
)
from data_pipeline.storage.durable import sync
from pretrain.merge.output.journal import Journal


@contextmanager
def resumed_folder(
    out: Path, head: dict[str, Any], needed: int, durable: bool = False, discard_unfinished: bool = False
) -> Iterator[tuple[Path, Journal]]:
    """Lock and yield the partial folder of `out` with its journal; publish it under `out` when the block succeeds.

    head:               identifies plan and inputs; a partial folder with the same head is resumed.
    needed:             bytes of the output, for the check of free space.
    durable:            also fsync the weights before publishing; without it, only the small files are synced.
    discard_unfinished: delete a partial folder with another head instead of raising UserError.

    If the block fails, the partial folder is kept as long as it has a finished span. Raises UserError as
    `locked_partial` does (another process writes it, the disk is full, ...).
    """
    with locked_partial(out) as partial:
        if not (partial / JOURNAL).exists():
            clear_partial(partial)
        journal = Journal(partial, head)
        try:
            if journal.stored_head != head:
                if not discard_unfinished:
                    raise UserError(_describe_mismatch(out, partial, journal.stored_head, head))
                journal.close()
                clear_partial(partial)
                journal = Journal(partial, head)
            check_space(out, needed - _reserved(partial))
            yield partial, journal
            for file in partial.iterdir():
                if durable or file.suffix != ".safetensors":
                    sync(file)
            sync(partial)
            publish_folder(partial, out)
            if durable:
                sync(out.parent)
        except BaseException:
            if not journal.done and journal.stored_head == head:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            journal.close()


def _describe_mismatch(out: Path, partial: Path, stored: dict[str, Any], head: dict[str, Any]) -> str:
    before, now = stored.get("inputs", {}), head.get("inputs", {})
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if stored.get("jobs") == head.get("jobs") and changed:
        return (
            f"{out}: {partial} has an unfinished merge, and {', '.join(changed)} changed since it began; "
            "restore the previous files, or delete that folder to start again"
        )
    return (
        f"{out}: {partial} has an unfinished merge of another plan; finish it with the command that started it, or "
        "delete that folder to start again"
    )


def _reserved(partial: Path) -> int:
    """Bytes on disk that the partial folder already occupies."""
    return sum(file.stat().st_blocks * 512 for file in partial.glob("*.safetensors"))
