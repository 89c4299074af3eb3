"""Starts vLLM servers as a user does, and a way to one that can be cut."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from launching import ROOT

START_LIMIT_S = 300


class Server:
    """`scripts/serve.py` in a process group of its own, which holds vLLM's engine and workers too."""

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self.port = quiet_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._command = [sys.executable, str(ROOT / "scripts" / "serve.py"), *arguments, f"--port={self.port}"]
        self._environment = os.environ | {
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            **environment,
        }  # fmt: skip
        self._start()

    def _start(self) -> None:
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT, env=self._environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def revive(self) -> None:
        """Start it again where it was killed."""
        if self._process.poll() is not None:
            self._start()

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(START_LIMIT_S):
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            time.sleep(1)
        raise TimeoutError(self._log.read_text()[-4000:])

    def pause(self) -> None:
        """Keep it from doing anything, its connections open."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """kill -9, as the kernel does when memory runs out."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def quiet_port() -> int:
    """A free port that no outgoing connection takes in the half minute before vLLM listens on it."""
    while True:
        port = random.randrange(15_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Detour:
    """A port that leads to a server until it is cut; then connections break and new ones are refused."""

    def __init__(self, server: Server) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._target = ("127.0.0.1", server.port)
        self._sockets: list[socket.socket] = []
        self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break everything now."""
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                self.num_connections += 1
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def files_left() -> Iterator[Path]:
    """What weight syncs left in memory."""
    return Path("/dev/shm").glob("clipo_ds-*")
