"""A truncated log survives a power cut: its new content is on disk before it replaces the old file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pretrain.run import metrics_log


def test_the_truncated_log_is_synced_before_it_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)))
    mine = path.with_suffix(".tmp")
    mine.write_text("keep me")
    synced: set[int] = set()
    replaced: list[bool] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        real_sync(file)

    def replace(source: Any, target: Any, **options: Any) -> None:
        replaced.append(os.stat(source).st_ino in synced)
        real_replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    metrics_log.truncate(path, 3)
    assert [row["step"] for row in metrics_log.read(path)] == [1, 2, 3]
    assert replaced == [True]
    assert tmp_path.stat().st_ino in synced  # the name as well
    assert mine.read_text() == "keep me"
