r"""Algebraic equality by math-verify, in worker processes that can be killed.

The lower half runs in the workers and imports `clipo_ds.algebra` there, which decides; the upper half runs wherever
answers are verified, on any thread, and imports `clipo_ds.math_worker` and `clipo_ds.types`.

What a comparison may take is counted in CPU seconds of its worker, which the system itself ends when they are used up,
so that a verdict does not depend on what else the machine does; the clock on the wall is a far cap, against a worker
that waits for ever. What was stopped or died gets one more try, in a fresh worker and beside no other comparison.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

from clipo_ds.math_worker import START_SECONDS, MathWorker, Outcome
from clipo_ds.types import VerifierLost

logger = logging.getLogger(__name__)

_MAX_TASKS = 5000  # comparisons after which a worker is replaced, because parser and sympy caches grow
_MAX_STARTS = 2  # a ctrl-C or a moment without memory may take a worker in the middle of its start
_PAUSE_SECONDS = 1.0  # before the second, where the system refused the first
_MAX_CRASHES = 8  # comparisons that nothing but crashes comes of before the machine is to blame and not they
_MEMORY_BYTES = 4 << 30  # address space of a worker: a hostile power must fail there, not fill the machine


class _Place:
    """Room for one worker; whoever has taken it may use, start and end it."""

    def __init__(self) -> None:
        self.worker: MathWorker | None = None


class SymbolicPool:
    """A fixed number of workers, each started when it is first needed. Safe to use from several threads at once.

    In a forked child the pool begins anew: the workers are the parent's.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._closed = False
        self._begin()
        _pools.add(self)

    def compare(self, pairs: Sequence[tuple[str, str]], timeout: float) -> list[Outcome]:
        """Compare (answer, truth) pairs in order, each within `timeout` CPU seconds of a worker.

        Raises:
            VerifierLost: no worker starts, or whatever they are asked ends them.
            RuntimeError: the pool is closed, also in the middle.
        """
        with self._taken(len(pairs)) as places:
            outcomes = self._side_by_side(pairs, timeout, places)
        for i, outcome in enumerate(outcomes):
            if outcome in ("timeout", "crash"):
                logger.debug("math-verify: %s on %.200r against %.200r", outcome, *pairs[i])
                outcomes[i] = self._alone(pairs[i], timeout)
        self._count_crashes(outcomes)
        return outcomes

    def close(self) -> None:
        """End all workers. A comparison that is under way in another thread ends with RuntimeError."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.stop()
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._free.get_nowait())
        for place in idle:
            self._end_worker(place)
            self._free.put(place)  # who waits for one is told that the pool is closed

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # of the one that wants to be alone
        self._free: queue.LifoQueue[_Place] = queue.LifoQueue()
        for _ in range(self._num_workers):
            self._free.put(_Place())
        self._workers: set[MathWorker] = set()
        self._crashes = 0  # since a worker last survived a comparison
        self._last_crash = ""

    def begin_anew(self) -> None:
        """In a forked child: leave the workers, and whatever was going on in other threads, to the parent."""
        for worker in self._workers:
            worker.disown()
        self._begin()

    @contextlib.contextmanager
    def _taken(self, count: int) -> Iterator[list[_Place]]:
        """As many places as are free, at least one and at most `count`, given back at the end."""
        places: list[_Place] = []
        try:
            if count:
                places.append(self._free.get())
            with contextlib.suppress(queue.Empty):
                while len(places) < count:
                    places.append(self._free.get_nowait())
            yield places
        finally:
            for place in places:
                self._free.put(place)

    def _alone(self, pair: tuple[str, str], timeout: float) -> Outcome:
        """The outcome of a comparison beside which this pool makes no other, in a worker that has made none before."""
        with self._turn, contextlib.ExitStack() as taken:
            places = [place for _ in range(self._num_workers) for place in taken.enter_context(self._taken(1))]
            place = next((place for place in places if place.worker is None), places[0])
            self._end_worker(place)
            return self._side_by_side([pair], timeout, [place])[0]

    def _side_by_side(
        self, pairs: Sequence[tuple[str, str]], timeout: float, places: Sequence[_Place]
    ) -> list[Outcome]:
        """The outcomes of the comparisons, at most one under way in each of the places."""
        for place in places:  # they start side by side; `_ready` waits for each
            if place.worker is None:
                with contextlib.suppress(OSError):  # it will try once more
                    self._start(place)
        outcomes: list[Outcome] = ["crash"] * len(pairs)
        idle, num_asked = list(places), 0
        running: dict[Connection, tuple[int, _Place, MathWorker]] = {}
        try:
            while running or num_asked < len(pairs):
                while idle and num_asked < len(pairs):
                    worker = self._ready(idle[-1])
                    running[worker.connection] = num_asked, idle.pop(), worker
                    worker.ask(*pairs[num_asked], timeout)
                    num_asked += 1
                deadline = min(worker.deadline for _, _, worker in running.values())
                answered = wait(list(running), max(0.0, deadline - time.monotonic()))
                for connection, (i, place, worker) in list(running.items()):
                    if connection in answered:
                        outcomes[i] = worker.answer()
                    elif time.monotonic() >= worker.deadline:
                        outcomes[i] = "timeout"
                    else:
                        continue
                    if outcomes[i] == "crash":
                        self._last_crash = worker.obituary()
                    if outcomes[i] in ("timeout", "crash") or worker.num_tasks >= _MAX_TASKS:
                        self._end_worker(place)
                    idle.append(place)
                    del running[connection]
        finally:  # an answer that nobody waits for any more must not be taken for that of the next comparison
            for _, place, _ in running.values():
                self._end_worker(place)
        return outcomes

    def _ready(self, place: _Place) -> MathWorker:
        """The place's worker once it can be asked."""
        for attempt in range(_MAX_STARTS):
            try:
                worker = place.worker or self._start(place)
            except OSError as error:
                reason: str | None = f"the system refuses one more process ({error})"
                time.sleep(0.0 if attempt else _PAUSE_SECONDS)
                continue
            try:
                reason = worker.fails_to_start(START_SECONDS)
                if reason is None:
                    return worker
            finally:  # also when interrupted, with its first answer on the way
                if not worker.is_ready:
                    self._end_worker(place)
            if not worker.died:
                break
        raise VerifierLost(f"answers cannot be verified: a worker process of math-verify does not start: {reason}")

    def _start(self, place: _Place) -> MathWorker:
        with self._lock:
            if self._closed:
                raise RuntimeError("this answer verifier is closed")
            worker = place.worker = MathWorker()
            self._workers.add(worker)
            return worker

    def _end_worker(self, place: _Place) -> None:
        worker, place.worker = place.worker, None
        if worker is not None:
            with self._lock:
                self._workers.discard(worker)
            worker.close()

    def _count_crashes(self, outcomes: Sequence[Outcome]) -> None:
        """One comparison that ends its worker is that comparison's fault; where none does anything else, it is not."""
        crashes = outcomes.count("crash")
        self._crashes = self._crashes + crashes if crashes == len(outcomes) else 0
        if self._crashes >= _MAX_CRASHES:
            raise VerifierLost(
                f"answers cannot be verified: the worker processes of math-verify died in the last {self._crashes} "
                f"comparisons: {self._last_crash}"
            )


_pools: weakref.WeakSet[SymbolicPool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool.begin_anew()


os.register_at_fork(after_in_child=_after_fork)


# What follows runs in the workers.


def serve(descriptor: int) -> None:
    """Answer comparisons on an inherited socket until its other end closes."""
    import signal
    import warnings

    from clipo_ds.algebra import equivalent

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, whose end closes the socket
    # The system counts a comparison's CPU seconds and ends this process with SIGPROF, also in the middle of one long
    # multiplication, where no Python code runs.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")  # stderr is for what ends the process
    _limit_memory()
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):  # the other end is gone
        while True:
            answer, truth, cpu_seconds = connection.recv()
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            found: bool | str
            try:
                found = equivalent(answer, truth)
            except MemoryError:  # what is left of this process may be anything
                raise
            except Exception as error:  # sympy may raise whatever there is, and the process is as good as before
                found = " ".join(f"{type(error).__name__}: {error}".split())
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(found)


def _limit_memory() -> None:
    """Bound this process's address space, where no lower bound stands already."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    standing = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([_MEMORY_BYTES, *standing]), hard))
