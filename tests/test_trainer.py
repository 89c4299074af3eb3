"""What a step records, and what one that cannot be finished leaves: the weights as they were, and its rollouts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
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


def test_every_reward_is_a_metric_and_a_column(tmp_path):
    (tmp_path / "mine.py").write_text("def short(num_tokens):\n    return [1 / n for n in num_tokens]\n")
    # A group is informative now and then: some places are filled with dropped groups.
    flags = [
        "--steps=1", "--objective.name=dapo", "--objective.max_sampling_rounds=1", "--reward.overlong_buffer=16",
        f"--reward.functions={{function: '{tmp_path}/mine.py:short', weight: 0.5}}", f"--run_dir={tmp_path}/run",
    ]  # fmt: skip
    trainer.train(load_config("demo", [*SMALL[1:], CPU, *flags]))
    distributed.stop()
    run = open_run(tmp_path / "run")
    [row] = run.metrics()
    table = run.rollouts(step=1).to_pandas()
    assert np.allclose(table["reward/short"], 1 / table["num_tokens"])
    parts = table["outcome_reward"] + table["reward/overlong"] + 0.5 * table["reward/short"]
    assert np.allclose(table["reward"], parts + table["contrastive_reward"], atol=1e-6)
    right = table.groupby("group")["correct"].transform("mean")
    kept = (right > 0) & (right < 1)
    assert (table["dropped"] == ~kept).all()
    assert row["sampling/unused"] == 1 - kept.mean()
    for name in ("overlong", "short"):
        assert row[f"reward/{name}"] == pytest.approx(table.loc[kept, f"reward/{name}"].mean())
    assert row["reward/mean"] == pytest.approx(parts[kept].mean())
    assert not table.loc[~kept, "contrastive_reward"].any()
    assert row["tokens/sampled"] == row["tokens/response"] == table["num_tokens"].sum()


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
