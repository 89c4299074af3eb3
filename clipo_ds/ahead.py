"""Sampling one step ahead: a thread asks the servers for the next step's rollouts while this step trains.

The thread runs nothing but `sample_round`, which is HTTP and touches no collective; when it starts, when it is awaited
and when weights may change is the loop's to say. The prompts are those that the next step draws, so neither the order
of prompts nor a checkpoint knows of it: a resumed run samples the batch again, with newer weights. Layer L3.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from clipo_ds.types import Group


class Ahead:
    """Holds the rollouts of at most one coming step, ready or on their way."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._step: int | None = None
        self._rollouts: Future[list[Group]] | None = None

    def start(self, step: int, sample: Callable[[], list[Group]]) -> None:
        """Begin to sample for a step."""
        if self._rollouts is not None:
            raise RuntimeError(f"step {self._step} is sampled already")
        self._step, self._rollouts = step, self._pool.submit(sample)

    def failure(self) -> Exception | None:
        """Wait until nothing is on its way; what went wrong, if anything did."""
        if self._rollouts is None:
            return None
        error = self._rollouts.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        return error

    def take(self, step: int) -> list[Group] | None:
        """The rollouts that were sampled for a step, which are handed out once; None if there are none."""
        if self._rollouts is None or self._step != step:
            return None
        rollouts, self._rollouts = self._rollouts.result(), None
        return rollouts

    def close(self) -> None:
        """Start nothing more; what is on its way is awaited when the process ends."""
        self._pool.shutdown(wait=False, cancel_futures=True)
