"""Stop signals of a launcher: counted or raised, handlers restored, and ignored signals left alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from launch.supervise.stop_signals import STOP_SIGNALS, StopSignals, signals_interrupt


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The usual handlers of a new process, restored after the test."""
    numbers = (*STOP_SIGNALS, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", STOP_SIGNALS)
def test_every_stop_signal_is_counted_and_the_first_is_named(first: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals() as stop:
        assert (stop.count, stop.first) == (0, None)
        signal.raise_signal(first)
        assert (stop.count, stop.first) == (1, first.name)
        for count, number in enumerate(STOP_SIGNALS, 2):
            signal.raise_signal(number)
            assert (stop.count, stop.first) == (count, first.name)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.count == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.count == 1
    with signals_interrupt():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGUSR1])
def test_signals_raise_and_are_restored(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), signals_interrupt(signal.SIGUSR1):
        signal.raise_signal(number)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)] == [
        signal.SIG_DFL
    ] * 3


def test_a_handler_that_somebody_set_is_left_alone_and_other_signals_too() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with signals_interrupt():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM]


def test_outside_the_main_thread_nothing_is_changed() -> None:
    found: list[object] = []

    def work() -> None:
        with signals_interrupt():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]
