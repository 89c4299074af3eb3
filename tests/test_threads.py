"""Actions in daemon threads: results in order, errors kept, no more at once than was said."""

from __future__ import annotations

import threading
import time

import pytest

from clipo_ds.threads import run_beside


def test_results_and_errors_are_those_of_each_action() -> None:
    first, second, third = run_beside([lambda: 1, lambda: 1 // 0, lambda: 3], 2)
    assert (first.result(), third.result()) == (1, 3)
    with pytest.raises(ZeroDivisionError):
        second.result()
    assert run_beside([]) == []


def test_no_more_run_at_once_than_was_said_and_what_waits_can_be_cancelled() -> None:
    gate, running = threading.Event(), []

    def action() -> None:
        running.append(threading.current_thread())
        gate.wait()

    futures = run_beside([action] * 5, 2)
    deadline = time.monotonic() + 10
    while len(running) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [future.cancel() for future in futures] == [False, False, True, True, True]
    gate.set()
    assert [future.result() for future in futures[:2]] == [None, None]
    assert len(running) == 2 and all(thread.daemon for thread in running)
