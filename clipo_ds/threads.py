"""Calls that may block, in threads that the end of the process does not wait for.

Those of `concurrent.futures` are joined when the interpreter ends: an error in the trainer, or ctrl-C, would wait until
every server has answered. Layer L2, imports nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")


def run_beside(actions: Sequence[Callable[[], Result]], num_threads: int | None = None) -> list[Future[Result]]:
    """Start all actions, each with a future that can be cancelled until its turn comes.

    Args:
        actions: What to run.
        num_threads: How many at once; None is all of them.
    """
    waiting: SimpleQueue[tuple[Future[Result], Callable[[], Result]]] = SimpleQueue()
    futures = [Future[Result]() for _ in actions]
    for pair in zip(futures, actions, strict=True):
        waiting.put(pair)

    def work() -> None:
        while True:
            try:
                future, action = waiting.get_nowait()
            except Empty:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = action()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    for _ in range(min(len(futures), num_threads or len(futures))):
        threading.Thread(target=work, daemon=True).start()
    return futures
