"""What a step that cannot be finished leaves: the weights as they were, and its rollouts in the run folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from launching import SMALL

from clipo_ds import distributed, trainer
from clipo_ds.config import load_config
from clipo_ds.contrastive_term import ContrastiveTerm
from clipo_ds.parts import Parts
from clipo_ds.records import open_run
from clipo_ds.types import MismatchError

CPU = f"--ds_config={Path(__file__).parents[1]}/ds_configs/zero3_cpu.json"


def stopped(run_dir: Path, kind: type[Exception], message: str, *flags: str) -> None:
    """Train until the first step fails as said."""
    config = load_config("demo", [*SMALL[1:], CPU, "--contrastive.head=linear", f"--run_dir={run_dir}", *flags])
    with pytest.raises(kind, match=message):
        trainer.train(config)
    distributed.stop()
    assert open_run(run_dir).metrics() == []
    assert open_run(run_dir).rollouts(step=1).num_rows == 32


def test_the_head_learns_nothing_from_another_models_rollouts(tmp_path, monkeypatch):
    monkeypatch.setattr(ContrastiveTerm, "learn", lambda *_: pytest.fail("the head learnt"))
    stopped(tmp_path / "run", MismatchError, "step 1: mismatch/max_abs", "--rollout.parity.max_abs=1e-12")


def test_a_broken_head_is_said_with_its_step(tmp_path, monkeypatch):
    build = trainer.build_parts

    def broken(*arguments) -> Parts:
        parts = build(*arguments)
        for weight in parts.term.head.parameters():
            weight.data.fill_(math.nan)
        return parts

    monkeypatch.setattr(trainer, "build_parts", broken)
    stopped(tmp_path / "run", FloatingPointError, "step 1: the contrastive embeddings are not finite")


def test_a_broken_gradient_of_the_head_is_said_with_its_step(tmp_path, monkeypatch):
    build = trainer.build_parts

    def broken(*arguments) -> Parts:
        parts = build(*arguments)
        for weight in parts.term.head.parameters():
            weight.register_hook(lambda gradient: gradient * math.nan)
        return parts

    monkeypatch.setattr(trainer, "build_parts", broken)
    stopped(tmp_path / "run", FloatingPointError, "step 1: the contrastive head's gradient norm is nan")
