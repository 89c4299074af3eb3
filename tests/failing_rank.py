"""A training run in which rank 1 fails alone, where FAILS_IN says; each rank leaves its exit code in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clipo_ds import trainer
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


def break_weights(score: Callable[..., Any]) -> Callable[..., Any]:
    """`score_groups`, but its second call finds no number in this rank's weights."""
    calls = []

    def broken(config: Any, policy: Any, *rest: Any, **options: Any) -> Any:
        calls.append(policy)
        if len(calls) == 2:
            for parameter in policy.model.parameters():
                for held in (parameter.data, parameter.ds_tensor):
                    held.fill_(torch.nan)
        return score(config, policy, *rest, **options)

    return broken


def main() -> int:
    """Train with one method of the sampler, or the weights, spoilt on rank 1."""
    if os.environ["RANK"] == "1" and os.environ["FAILS_IN"] == "generate":
        error: Exception = FloatingPointError("rank 1 alone: not finite")
        TransformersEngine.generate = fail_at(2, TransformersEngine.generate, error)
    if os.environ["RANK"] == "1" and os.environ["FAILS_IN"] == "load_weights":
        # The first sync is before the first step.
        error = RuntimeError("rank 1 alone: no room for weights")
        TransformersEngine.load_weights = fail_at(3, TransformersEngine.load_weights, error)
    if os.environ["RANK"] == "1" and os.environ["FAILS_IN"] == "score":
        trainer.score_groups = break_weights(trainer.score_groups)
    code = train_main(sys.argv[1:])
    Path(os.environ["FAILS_IN_FOLDER"], f"rank{os.environ['RANK']}").write_text(str(code))
    return code


if __name__ == "__main__":
    run_ranks(main)
