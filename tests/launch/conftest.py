"""Kills launchers that a failed test leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.launching import Launcher


@pytest.fixture(autouse=True)
def no_launcher_left() -> Iterator[None]:
    yield
    while Launcher.started:
        process = Launcher.started.pop()
        process.kill()
        process.wait()
