"""Folders that appear under their name only when they are complete, each written by one process at a time."""

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
from data_pipeline.storage.files import sync
from pretrain.merge.output.journal import Journal


@contextmanager
def resumed_folder(
    out: Path, head: dict[str, Any], needed: int, durable: bool = False, anew: bool = False
) -> Iterator[tuple[Path, Journal]]:
    """A folder to fill, as `new_folder`, with a journal: what was begun for the same `head` is found again.

    When the block fails, the folder is kept for the next time if anything in it is finished. Raises UserError also for
    what was begun for another head, unless it is to begin `anew`. `durable`: before it appears the disk has the
    weights too, and not only the small files beside them.
    """
    with locked_partial(out) as partial:
        if not (partial / JOURNAL).exists():
            clear_partial(partial)
        journal = Journal(partial, head)
        try:
            if journal.begun != head:
                if not anew:
                    raise UserError(_other(out, partial, journal.begun, head))
                journal.close()
                clear_partial(partial)
                journal = Journal(partial, head)
            check_space(out, needed - _reserved(partial))
            yield partial, journal
            for file in partial.iterdir():
                if durable or file.suffix != ".safetensors":
                    sync(file)
            if durable:
                sync(partial)
            publish_folder(partial, out)
            if durable:
                sync(out.parent)
        except BaseException:
            if not journal.done and journal.begun == head:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            journal.close()


def _other(out: Path, partial: Path, begun: dict[str, Any], head: dict[str, Any]) -> str:
    before, now = begun.get("inputs", {}), head.get("inputs", {})
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if begun.get("jobs") == head.get("jobs") and changed:
        return (
            f"{out}: an unfinished merge lies in {partial}, and {', '.join(changed)} changed since it began; "
            "put back what was there, or delete that folder to begin anew"
        )
    return (
        f"{out}: an unfinished merge of another plan lies in {partial}; finish it with the command that began it, or "
        "delete that folder to begin anew"
    )


def _reserved(partial: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in partial.glob("*.safetensors"))
