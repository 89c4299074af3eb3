"""Whole runs with vLLM inside this process: what a resumed one repeats, and that a run which fails leaves no engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from launching import ROOT, SMALL, comparable, metrics

from clipo_ds import distributed, parts, trainer
from clipo_ds.config import load_config

pytestmark = pytest.mark.vllm

SETTINGS = [
    *SMALL[1:], f"--ds_config={ROOT}/ds_configs/zero3_cpu.json", "--rollout.engine=vllm", "--steps=4",
    "--checkpoint.every=2", "--optimizer.learning_rate=1e-2", "--logging.show_every=null",
]  # fmt: skip


def train(run_dir: Path, *flags: str) -> None:
    try:
        trainer.train(load_config("demo", [*SETTINGS, f"--run_dir={run_dir}", *flags]))
    finally:
        distributed.stop()


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    """On one rank: the same requests in the same order make the same batches, so even rounding repeats itself."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    train(resumed, "--resume=auto")
    rows = [[comparable(row) for row in metrics(folder)] for folder in (whole, resumed)]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    assert rows[1] == rows[0]


def test_vllm_is_closed_when_a_later_part_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import parallel_state

    def disk_is_full(*_: object) -> NoReturn:
        assert parallel_state._WORLD is not None
        raise OSError("no space left")

    monkeypatch.setattr(parts, "_description", disk_is_full)
    with pytest.raises(OSError, match="no space left"):
        train(tmp_path / "run")
    assert parallel_state._WORLD is None
