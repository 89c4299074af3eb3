"""What becomes of answers where the worker processes do not start, die, or are not given what they need.

The workers are real ones: what is in their way is a library in the path before math-verify, a program in the place of
Python, or a limit of the system.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import psutil
import pytest

from clipo_ds import symbolic
from clipo_ds.answers import AnswerVerifier
from clipo_ds.math_worker import MathWorker
from clipo_ds.symbolic import SymbolicPool
from clipo_ds.types import VerifierLost

SIX = [(f"{n}+1", "x") for n in range(6)]
LIBRARY = """
import os, sys, time

FAULT = {fault!r}
if FAULT == "exit":
    sys.exit("first line\\nno room for math-verify today")
if FAULT == "import":
    raise ImportError("libflint.so.20: cannot open shared object file")
if FAULT == "hang":
    print("waiting for the licence server", file=sys.stderr, flush=True)
    time.sleep(600)

class LatexExtractionConfig:
    def __init__(self, **settings): pass

def parse(text, *rest, **settings):
    number = "x" not in text.replace("boxed", "")
    if number and FAULT == "die":
        print("bus error ahead", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if number and FAULT == "raise":
        raise KeyError("no such symbol")
    return [text]

def verify(*rest, **settings):
    return FAULT != "wrong"
"""
GRADER = "def is_assignment_relation(expression): return False\ndef is_equation(expression): return False\n"


@pytest.fixture
def faulty_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a math-verify with the given fault before the real one, in the workers that are started from now on."""

    def put(fault: str) -> None:
        folder = tmp_path / "path" / "math_verify"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(LIBRARY.format(fault=fault))
        (folder / "grader.py").write_text(GRADER)
        monkeypatch.setenv("PYTHONPATH", str(folder.parent))

    return put


@pytest.fixture
def python_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run shell commands before Python in each worker that is started from now on."""

    def put(commands: str) -> None:
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\n{commands}\nexec {sys.executable} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return put


def what_is_said(num_workers: int = 2) -> str:
    """The one line with which six comparisons end, soon."""
    pool = SymbolicPool(num_workers)
    try:
        with pytest.raises(VerifierLost) as caught:
            pool.compare(SIX, 5.0)
    finally:
        pool.close()
    [line] = str(caught.value).splitlines()
    assert line.startswith("answers cannot be verified: ")
    return line


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("exit", "does not start: it ended with exit code 1 (no room for math-verify today)"),
        ("import", "does not start: ImportError: libflint.so.20: cannot open shared object file"),
        ("wrong", "does not start: it finds x + x different from 2x"),
    ],
)
def test_workers_that_end_at_their_start_are_one_line_with_what_one_said(faulty_library, fault, said):
    # Six pairs and two workers: what was not given back was waited for without end.
    faulty_library(fault)
    assert said in what_is_said()


def test_a_worker_that_hangs_at_its_start_is_waited_for_once(faulty_library, monkeypatch):
    faulty_library("hang")
    monkeypatch.setattr(symbolic, "START_SECONDS", 3.0)
    began = time.monotonic()
    assert "does not start: it gave no answer for 3 s (waiting for the licence server)" in what_is_said()
    assert time.monotonic() - began < 20


def test_workers_that_die_at_every_comparison_are_not_taken_for_wrong_answers(faulty_library, monkeypatch):
    faulty_library("die")
    monkeypatch.setattr(symbolic, "_MAX_CRASHES", 2)
    pool = SymbolicPool(1)
    try:
        assert pool.compare([("x+1", "1+x")], 5.0) == ["same"]  # only numbers are its end
        assert pool.compare([(r"1+\sqrt{2}", "2")], 5.0) == ["crash"]
        said = r"died in the last 2 comparisons: it was ended by SIGKILL \(bus error ahead\)"
        with pytest.raises(VerifierLost, match=said):
            pool.compare([(r"1+\sqrt{2}", "3")], 5.0)
    finally:
        pool.close()


def test_what_the_algebra_raises_fails_that_answer_alone(faulty_library):
    faulty_library("raise")
    with AnswerVerifier(workers=1) as verifier:
        texts = [r"\boxed{\sqrt{4}}", r"\boxed{x+1}"]
        verdicts = verifier.verify_many(texts, ["2", "1+x"])
        assert [verdict.status for verdict in verdicts] == ["error", "verified"]
        [worker] = verifier._pool._workers  # the same for both: nothing was started anew
        assert worker.num_tasks == 3


def test_a_python_that_is_not_there_and_a_full_table_of_files_are_one_line_and_nothing_is_lost(monkeypatch):
    pool = SymbolicPool(2)
    monkeypatch.setattr(symbolic, "_PAUSE_SECONDS", 0.0)
    with monkeypatch.context() as changes:
        changes.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(VerifierLost, match=r"refuses one more process .*directory: '/nowhere"):
            pool.compare(SIX, 5.0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 50, limits[1]))
    taken: list[int] = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.dup(0))
        for _ in range(3):  # each of the descriptors that a start takes may be the one too many
            with pytest.raises(VerifierLost, match=r"refuses one more process .*Too many open files"):
                pool.compare(SIX, 5.0)
            os.close(taken.pop())
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert pool.compare([("2+3", "5"), ("2+3", "6")], 20.0) == ["same", "different"]
    pool.close()


def test_no_memory_for_a_start_is_one_line(python_after):
    python_after("ulimit -v 40000")
    line = what_is_said()
    assert "does not start: it ended with exit code" in line or "does not start: MemoryError" in line


@pytest.mark.parametrize(("soft", "hard"), [(3, 20), (3, 3), (20, 30)])
def test_the_memory_guard_raises_no_limit_that_stands(python_after, soft, hard):
    gigabyte = 1 << 30
    python_after(f"ulimit -Sv {soft << 20}; ulimit -Hv {hard << 20}")
    worker = MathWorker()
    try:
        assert worker.fails_to_start(60.0) is None
        limits = psutil.Process(worker.pid).rlimit(psutil.RLIMIT_AS)
        assert limits == (min(soft, 4) * gigabyte, hard * gigabyte)
    finally:
        worker.close()
