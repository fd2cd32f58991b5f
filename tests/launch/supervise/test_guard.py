"""The guard: it asks for its signal, then becomes the command with all its words."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from launch.supervise import guard


def test_a_guarded_command_gets_its_words_and_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(guard, "die_with", lambda *given: asked.append(given))
    monkeypatch.setattr(os, "execvp", lambda *given: asked.append(given))
    words = guard.guarded(["echo", "two words", "--"], signal.SIGTERM)
    guard.main(words[words.index("launch.supervise.guard") + 1 :])
    assert asked == [(os.getpid(), signal.SIGTERM), ("echo", ["echo", "two words", "--"])]


@pytest.mark.parametrize("words", [["1", "SIGKILL", "--"], ["1", "SIGKILL", "echo", "x"]])
def test_a_guard_without_a_command_says_how_it_is_called(words: list[str]) -> None:
    with pytest.raises(
        SystemExit, match=r"usage: python -P -m launch\.supervise\.guard PID SIGNAL -- COMMAND"
    ):
        guard.main(words)
