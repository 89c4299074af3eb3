"""One process that compares answers, seen from the side that asks it. Imports the standard library only.

The process is a fresh ``python -c`` that runs `clipo_ds.symbolic.serve`, and never the program's ``__main__``
(multiprocessing's spawn and forkserver import that again, with torch and DeepSpeed, for every worker and every restart;
fork copies CUDA contexts and held locks). It gets one comparison at a time over a socket pair; when this process ends,
however it ends, the socket closes and the worker ends too, at the latest when the comparison that it is at has used up
its CPU seconds. No signal is used on this side.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Literal

Outcome = Literal["same", "different", "timeout", "crash", "error"]
"""What became of a comparison: two verdicts; stopped at its time limit; the process died; the algebra raised."""

START_SECONDS = 120.0  # limit for a worker's start (it takes half a second on an idle machine)
WALL_SECONDS, WALL_FACTOR = 60.0, 20.0  # of a comparison with a limit of t CPU seconds: at most the one + the other * t
_LONGEST_WAIT = 86400.0  # seconds; the system's own limit is 24 days
_END_SECONDS = 10.0  # that a dead process may take to be one
_MAX_WORDS = 300
_COMMAND = "import sys; sys.path.insert(0, sys.argv[1]); from clipo_ds.symbolic import serve; serve(int(sys.argv[2]))"


class MathWorker:
    """A worker process and the socket to it. Used by one thread at a time, but for `stop`.

    Raises (from the constructor):
        OSError: the system refuses a process or a file descriptor.
    """

    def __init__(self) -> None:
        package_parent = str(Path(__file__).resolve().parents[1])
        with contextlib.ExitStack() as lent, contextlib.ExitStack() as own:
            self.connection, other_end = Pipe()
            own.callback(self.connection.close)
            lent.callback(other_end.close)
            self._stderr, stderr = os.pipe()
            own.callback(os.close, self._stderr)
            lent.callback(os.close, stderr)
            # Nobody reads along, and a full pipe must lose words rather than hold the worker up.
            os.set_blocking(self._stderr, False)
            os.set_blocking(stderr, False)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND, package_parent, str(other_end.fileno())],
                pass_fds=[other_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy orders by hash: equal verdicts on every run
            )
            own.pop_all()
        self.pid = self._process.pid
        self.num_tasks = 0
        self.deadline = 0.0  # of the comparison that it is at, by `time.monotonic`
        self.is_ready = False
        self.died = False  # without anyone's asking
        self._said = ""

    def fails_to_start(self, seconds: float) -> str | None:
        """Wait until the worker has judged a first comparison; why it does not in this time, or None when it is ready.

        The first comparison is one of which the verdict is known, so that a worker that dies or hangs at every one is
        found here.
        """
        if self.is_ready:
            return None
        self.ask("x + x", "2x", START_SECONDS)
        if not self.connection.poll(seconds):
            return f"it gave no answer for {seconds:g} s{self._last_words()}"
        outcome = self.answer()
        if outcome == "same":
            self.is_ready = True
            return None
        if outcome == "different":
            return "it finds x + x different from 2x"
        return self.obituary() if outcome in ("timeout", "crash") else self._said

    def ask(self, answer: str, truth: str, cpu_seconds: float) -> None:
        """Hand over a comparison, of which `answer` gives the outcome once `connection` has something to read."""
        self.num_tasks += 1
        self.deadline = time.monotonic() + min(_LONGEST_WAIT, WALL_SECONDS + WALL_FACTOR * cpu_seconds)
        with contextlib.suppress(OSError):  # the process is gone, which `answer` will say
            self.connection.send((answer, truth, cpu_seconds))

    def answer(self) -> Outcome:
        """The outcome of the comparison asked for; the worker is no longer there when it is `timeout` or `crash`."""
        try:
            found = self.connection.recv()
        except (EOFError, OSError):  # ended by its CPU limit, out of memory, killed from outside, or half an answer
            self.died = self._exit_code() != -signal.SIGPROF
            return "crash" if self.died else "timeout"
        if isinstance(found, bool):
            return "same" if found else "different"
        self._said = str(found)
        return "error"

    def obituary(self) -> str:
        """How a worker that is gone came to its end, in a few words, and what it said last."""
        code = self._exit_code()
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        return f"{how}{self._last_words()}"

    def stop(self) -> None:
        """End the process; whoever waits for its answer gets `crash`. The one method that any thread may call."""
        self._process.kill()

    def close(self) -> None:
        """End the process and give everything back."""
        self.stop()
        self._exit_code()
        self.disown()

    def disown(self) -> None:
        """Close this process's ends and leave the worker alone: in a forked child it is the parent's."""
        self.connection.close()
        os.close(self._stderr)
        if self._process.returncode is None:
            self._process.returncode = 0  # or Python would complain that nobody waited for it

    def _exit_code(self) -> int:
        """Of a process whose end of the socket is closed: it has ended, is about to, or is made to."""
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # kill does not reach a process that waits for a dead disk
            return self._process.wait(_END_SECONDS)
        return -signal.SIGKILL

    def _last_words(self) -> str:
        """The last line on its stderr, in brackets."""
        text = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._stderr, 65536):
                text += piece
        lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
        return f" ({lines[-1][:_MAX_WORDS]})" if lines else ""
