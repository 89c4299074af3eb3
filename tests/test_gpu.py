"""What a GPU has to do as the CPU does; wants one GPU (`DS_ACCELERATOR=cuda pytest -m gpu`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from launching import SMALL, comparable, metrics, train

from clipo_ds.contrastive import LOSSES, SIMILARITIES, contrastive_loss
from clipo_ds.records import open_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("DS_ACCELERATOR") != "cuda", reason="wants DS_ACCELERATOR=cuda and a GPU"),
]

LORA = ["--model.lora.rank=4", "--optimizer.learning_rate=0.003"]
BF16 = ["--model.dtype=bfloat16"]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "infonce"])  # whose draws differ by device
def test_contrastive_loss_and_gradient_are_those_of_the_cpu(loss: str, similarity: str) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(48, 16, generator=generator, dtype=torch.float64), dim=1)
    correct, group = torch.rand(48, generator=generator) < 0.5, torch.arange(48) // 8
    results = []
    for device in ("cpu", "cuda"):
        leaf = embeddings.to(device).detach().clone().requires_grad_()
        found = contrastive_loss(leaf, correct.to(device), group.to(device), loss=loss, similarity=similarity)
        found.mean.backward()
        results.append((found.mean.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(results[1], results[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("policy", [[], LORA, BF16, [*LORA, *BF16]], ids=["full", "lora", "full bf16", "lora bf16"])
@pytest.mark.parametrize("file", ["zero2", "zero3", "zero3_offload"])
def test_the_demo_trains_on_one_gpu(file: str, policy: list[str], tmp_path: Path) -> None:
    train(*SMALL, f"--ds_config=ds_configs/{file}.json", "--steps=2", *policy, f"--run_dir={tmp_path}", ranks=1)
    assert open_run(tmp_path).environment["gpus"]
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]  # above a limit of the parity probe it would have stopped
    assert (tmp_path / "checkpoints" / "step_000002" / "checkpoint.json").is_file()


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = [*SMALL, "--ds_config=ds_configs/zero3.json", "--checkpoint.every=2", "--optimizer.mini_batches=2"]
    train(*settings, "--steps=4", f"--run_dir={tmp_path}/whole", ranks=1)
    train(*settings, "--steps=2", f"--run_dir={tmp_path}/parts", ranks=1)
    train(*settings, "--steps=4", "--resume=auto", f"--run_dir={tmp_path}/parts", ranks=1)
    for left, right in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert comparable(left) == pytest.approx(comparable(right), rel=1e-3, abs=1e-4)
