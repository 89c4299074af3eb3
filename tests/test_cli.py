"""How a process of a rank ends: with its exit code and all it has said, and without the interpreter's teardown."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from clipo_ds.cli import run_ranks

class Late:
    def __del__(self):
        print("torn down", flush=True)

late = Late()

def main():
    atexit.register(print, "atexit")
    {what}

run_ranks(main)
"""


@pytest.mark.parametrize(
    ("what", "code", "error"),
    [
        ("return 0", 0, ""),
        ("return 130", 130, ""),
        ("import argparse; argparse.ArgumentParser(prog='train').parse_args(['--typo'])", 2, "unrecognized arguments"),
        ("import argparse; argparse.ArgumentParser(prog='train').parse_args(['--help'])", 0, ""),
        ("raise ZeroDivisionError('of the program')", 1, "ZeroDivisionError: of the program"),
        ("sys.exit('of the program')", 1, "of the program"),
    ],
)
def test_a_rank_ends_with_its_code_and_without_the_teardown_of_the_interpreter(what, code, error):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(what=what)], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.endswith("atexit\n")
    assert error in done.stderr


def test_a_rank_without_a_standard_output_ends_as_well():
    script = PROGRAM.format(what="sys.exit(7)").replace('atexit.register(print, "atexit")', "pass")
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")
