"""A training run in which rank 1 fails alone, where FAILS_IN says; each rank leaves its exit code in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipo_ds.cli import run_ranks, train_main
from clipo_ds.generation import TransformersEngine


def fail_at(call: int, what: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """The method, but its `call`-th call takes one of the prompts or weights that it is given, and raises."""
    calls = []

    def method(engine: TransformersEngine, given: Any, *rest: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) < call:
            return what(engine, given, *rest, **options)
        next(iter(given))
        raise error

    return method


def main() -> int:
    """Train with one method of the sampler spoilt on rank 1."""
    if os.environ["RANK"] == "1" and os.environ["FAILS_IN"] == "generate":
        error: Exception = FloatingPointError("rank 1 alone: not finite")
        TransformersEngine.generate = fail_at(2, TransformersEngine.generate, error)
    if os.environ["RANK"] == "1" and os.environ["FAILS_IN"] == "load_weights":
        # The first sync is before the first step.
        error = RuntimeError("rank 1 alone: no room for weights")
        TransformersEngine.load_weights = fail_at(3, TransformersEngine.load_weights, error)
    code = train_main(sys.argv[1:])
    Path(os.environ["FAILS_IN_FOLDER"], f"rank{os.environ['RANK']}").write_text(str(code))
    return code


if __name__ == "__main__":
    run_ranks(main)
