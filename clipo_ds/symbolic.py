r"""Algebraic equality by math-verify, in worker processes that can be killed.

The lower half runs in the workers and imports `clipo_ds.algebra` there, which decides; the upper half runs wherever
answers are verified, on any thread, and imports nothing of the package.

Each worker is a fresh ``python -c`` process that imports sympy and nothing of torch, and never the program's
``__main__`` (multiprocessing's spawn and forkserver import that again, with torch and DeepSpeed, for every worker and
every restart; fork copies CUDA contexts and held locks). It gets one comparison at a time over a socket pair. When an
answer is not back in time the worker is killed and another one started; when this process ends, however it ends, the
socket closes and the workers end too. No signal is used on this side.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

Outcome = Literal["same", "different", "timeout", "crash"]

_START_SECONDS = 120.0  # limit for a worker's start (it takes half a second on an idle machine)
_MAX_TASKS = 5000  # comparisons after which a worker is replaced, because parser and sympy caches grow
_MEMORY_BYTES = 4 << 30  # address space of a worker: a hostile power must fail there, not fill the machine
_COMMAND = "import sys; sys.path.insert(0, sys.argv[1]); from clipo_ds.symbolic import serve; serve(int(sys.argv[2]))"


class _Worker:
    """One process and the socket to it. Used by one thread at a time."""

    def __init__(self) -> None:
        self._connection, other_end = Pipe()
        package_parent = str(Path(__file__).resolve().parents[1])
        with other_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND, package_parent, str(other_end.fileno())],
                pass_fds=[other_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy orders by hash: equal verdicts on every run
            )
        self._ready = False
        self.num_tasks = 0

    def wait_until_ready(self) -> None:
        """Raises RuntimeError when the worker cannot start, with the reason it gave."""
        if self._ready:
            return
        try:
            answered = self._connection.poll(_START_SECONDS)
            greeting = self._connection.recv() if answered else f"no answer after {_START_SECONDS:.0f} s"
        except EOFError:
            greeting = f"it ended with exit code {self._process.wait()}"
        if greeting != "ready":
            raise RuntimeError(f"a math-verify worker did not start: {greeting}")
        self._ready = True

    def compare(self, answer: str, truth: str, timeout: float) -> Outcome:
        self.num_tasks += 1
        try:
            self._connection.send((answer, truth))
            if not self._connection.poll(timeout):
                return "timeout"
            return "same" if self._connection.recv() else "different"
        except (EOFError, ConnectionError):  # the process is gone: out of memory, or killed from outside
            return "crash"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


class SymbolicPool:
    """A fixed number of workers, started at the first comparison. Safe to use from several threads at once."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def compare(self, pairs: Sequence[tuple[str, str]], timeout: float) -> list[Outcome]:
        """Compare (answer, truth) pairs, `timeout` seconds each, in order; raises RuntimeError once closed."""
        if len(pairs) <= 1 or self._num_workers == 1:
            return [self._compare_one(pair, timeout) for pair in pairs]
        with ThreadPoolExecutor(min(self._num_workers, len(pairs))) as threads:
            return list(threads.map(lambda pair: self._compare_one(pair, timeout), pairs))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
            self._workers.clear()

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise RuntimeError("this answer verifier is closed")
            worker = _Worker()
            self._workers.add(worker)
            return worker

    def _replace(self, worker: _Worker) -> None:
        with self._lock:
            if worker in self._workers:
                worker.kill()
                self._workers.discard(worker)
        if not self._closed:
            self._idle.put(self._start())

    def _compare_one(self, pair: tuple[str, str], timeout: float) -> Outcome:
        with self._lock:
            missing = 0 if self._workers else self._num_workers
        for _ in range(missing):
            self._idle.put(self._start())
        worker = self._idle.get()
        worker.wait_until_ready()
        outcome = worker.compare(*pair, timeout)
        if outcome in ("timeout", "crash"):
            logger.debug("math-verify %s on %.200r against %.200r", outcome, *pair)
        if outcome in ("timeout", "crash") or worker.num_tasks >= _MAX_TASKS:
            self._replace(worker)
        else:
            self._idle.put(worker)
        return outcome


# What follows runs in the workers.


def serve(descriptor: int) -> None:
    """Answer comparisons on an inherited socket until its other end closes."""
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, whose end closes the socket
    logging.disable(logging.CRITICAL)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES if hard == resource.RLIM_INFINITY else hard, hard))
    connection = Connection(descriptor)
    from clipo_ds.algebra import equivalent

    try:
        equivalent("x + x", "2x")  # imports and first parse now, so that they are in no comparison's time
    except ImportError as error:
        connection.send(str(error))
        return
    connection.send("ready")
    while True:
        try:
            answer, truth = connection.recv()
        except EOFError:
            return
        connection.send(equivalent(answer, truth))
