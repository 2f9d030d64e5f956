"""The first signal asks, a second one acts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from featdistill.engine.signals import stop_on_signals


@pytest.fixture(autouse=True)
def _foreground() -> Iterator[None]:
    """As in a terminal's foreground, even where the tests run as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signal is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        assert request.signal is None
        signal.raise_signal(number)
        assert request.signal == number
        assert signal.getsignal(number) == before, "a second one acts as it always did"
    assert signal.getsignal(number) == before


def test_a_second_interrupt_is_one() -> None:
    with stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_another_thread_leaves_handlers_alone() -> None:
    found: list[object] = []

    def work() -> None:
        with stop_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
