"""The parity probe: its limits, and runs whose sampler is sabotaged from outside.

What those runs print is shown by `pytest tests/test_parity.py --log-cli-level=INFO`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from launching import SMALL
from torch import Tensor

from clipo_ds import distributed, trainer, vllm_engine
from clipo_ds.config import load_config
from clipo_ds.generation import TransformersEngine
from clipo_ds.parity import check_after_sync, check_parity, likely_causes, parity_limits
from clipo_ds.records import open_run
from clipo_ds.schema import TrainConfig
from clipo_ds.types import MismatchError

logger = logging.getLogger(__name__)

ENGINES = [
    pytest.param("transformers"),
    pytest.param("vllm", marks=pytest.mark.vllm),
]
# Limits differ with the precision: what stops a run is another figure.
DTYPES = {"float32": "max_abs", "bfloat16": "mean_abs"}
CPU = f"--ds_config={Path(__file__).parents[1]}/ds_configs/zero3_cpu.json"
# Steps that move the weights far enough to be seen, with gradients in each of them.
FAST = ["--steps=3", "--optimizer.learning_rate=1e-2", "--objective.kl_coefficient=0"]


def config(*flags: str) -> TrainConfig:
    return load_config("demo", [*SMALL[1:], CPU, *FAST, *flags])


def measured(max_abs: float, mean_abs: float = 0.0, p999_abs: float = 0.0) -> dict[str, float]:
    return {"mismatch/max_abs": max_abs, "mismatch/mean_abs": mean_abs, "mismatch/p999_abs": p999_abs}


def after_sync(max_abs: float, mean_abs: float = 0.0, p999_abs: float = 0.0) -> dict[str, float]:
    names = {"": max_abs, "_mean": mean_abs, "_p999": p999_abs}
    return {f"mismatch/after_sync{name}": value for name, value in names.items()}


@pytest.mark.parametrize(
    ("flags", "limits"),
    [
        ([], {"max_abs": 1e-3}),
        (["--model.dtype=bfloat16"], {"mean_abs": 0.05, "p999_abs": 0.5}),
        (["--rollout.dtype=bfloat16"], {"mean_abs": 0.05, "p999_abs": 0.5}),
        (["--rollout.parity.max_abs=0.2", "--rollout.parity.p999_abs=0.1"], {"max_abs": 0.2, "p999_abs": 0.1}),
        (["--rollout.parity.max_abs=null"], {}),
    ],
)
def test_limits_follow_the_precision_of_both_sides_unless_they_are_given(
    flags: list[str], limits: dict[str, float]
) -> None:
    assert parity_limits(config(*flags)) == limits


def test_only_what_is_above_a_limit_stops_and_the_message_says_where_to_look() -> None:
    check_parity(config(), measured(9e-4))
    with pytest.raises(
        MismatchError, match=r"mismatch/max_abs = 0.002 is above rollout.parity.max_abs = 0.001 \(mean "
    ):
        check_parity(config(), measured(2e-3))
    half = config("--model.dtype=bfloat16")
    check_parity(half, measured(3.0, 0.049, 0.49))  # the largest of very many tokens alone says nothing
    with pytest.raises(MismatchError, match=r"p999_abs = 0.51 .* \(mean 0.01, 99.9th percentile 0.51, largest 0.7\): "):
        check_parity(half, measured(0.7, 0.01, 0.51))
    with pytest.raises(MismatchError, match=r"mean_abs = 0.06 .* likeliest first: a weight sync .* round bfloat16"):
        check_parity(half, measured(0.1, 0.06))


@pytest.mark.parametrize("flags", [[], ["--rollout.parity.max_abs=null"], ["--model.dtype=bfloat16"]])
@pytest.mark.parametrize("stale", [False, True])
def test_what_is_no_number_is_a_mismatch_whatever_the_limits_unless_nothing_was_sampled(
    flags: list[str], stale: bool
) -> None:
    with pytest.raises(MismatchError, match="mean_abs = nan: the trainer gives sampled tokens log-probabilities that"):
        check_parity(config(*flags), measured(math.inf, math.nan, math.inf), stale=stale)
    check_parity(config(*flags), measured(0.0, math.nan), stale=stale)


def test_rollouts_that_are_known_to_be_stale_are_only_measured() -> None:
    check_parity(config(), measured(3.0), stale=True)


def test_importance_weights_are_on_for_vllm_and_off_by_one_field() -> None:
    assert config().importance_cap is None
    assert config("--rollout.engine=vllm").importance_cap == 2
    assert config("--rollout.engine=vllm", "--objective.importance_cap=null").importance_cap is None
    assert config("--objective.importance_cap=3").importance_cap == 3


@pytest.mark.parametrize(
    ("flags", "first", "impossible"),
    [
        ([], "a weight sync that was skipped", ["lm_head", "LoRA", "prefix cache", "server", "dtype", "top_p"]),
        (["--rollout.engine=vllm"], "tied embeddings whose lm_head.weight", ["LoRA", "server", "dtype", "top_p"]),
        (["--model.lora.rank=4"], "a LoRA adapter that was not merged", ["lm_head", "rollout.vllm.lora", "server"]),
        (
            ["--model.lora.rank=4", "--rollout.engine=vllm", "--rollout.vllm.lora=adapter"],
            "a LoRA adapter that never reached the sampler (rollout.vllm.lora adapter)",
            ["lm_head", "merged", "server"],
        ),
        (["--rollout.dtype=bfloat16"], "rollout.dtype bfloat16 beside model.dtype float32", ["lm_head", "LoRA"]),
        (
            ["--rollout.engine=vllm_server", "--rollout.server.urls=http://h:1", "--model.lora.rank=4"],
            "a LoRA adapter that was not merged",
            ["lm_head", "rollout.vllm.lora"],
        ),
    ],
)
def test_causes_are_those_that_the_run_can_have(flags: list[str], first: str, impossible: list[str]) -> None:
    causes = likely_causes(config(*flags), tied_head=True)
    assert causes[0].startswith(first)
    assert [word for word in impossible if word in "; ".join(causes)] == []
    assert any("sync that was skipped" in cause for cause in causes)


# -- sabotage ----------------------------------------------------------------------------------------------------------


def stopped(run_dir: Path, dtype: str, *flags: str) -> str:
    """Train until the probe stops the run at its second step, and give the causes that it names."""
    with pytest.raises(MismatchError) as caught:
        trainer.train(config(*flags, f"--model.dtype={dtype}", f"--run_dir={run_dir}"))
    distributed.stop()
    message = str(caught.value)
    run = open_run(run_dir)
    (healthy,) = run.metrics()  # the second step changed nothing and counts for nothing
    figures = ", ".join(f"{name} {healthy[f'mismatch/{name}']:.3g}" for name in ("mean_abs", "p999_abs", "max_abs"))
    logger.info("the step before: %s", figures)
    logger.info("the run says: %s", message)
    assert message.startswith(f"step 2: mismatch/{DTYPES[dtype]} = ")
    assert "its rollouts are written" in message
    assert message.endswith(f"stopped after step 1 of 3; go on with --resume {run_dir}/checkpoints/step_000001")
    assert run.rollouts(step=2).num_rows == 32
    return message.partition("the likeliest first: ")[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_skipped_sync_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, dtype: str) -> None:
    monkeypatch.setattr(trainer, "sync_weights", lambda model, engine: None)  # the first one is in clipo_ds.parts
    assert "a weight sync that was skipped" in stopped(tmp_path / "run", dtype, f"--rollout.engine={engine}")


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stale_tied_head_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    load, first = vllm_engine.VllmEngine.load_weights, {}

    def stale_head(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, first.setdefault(name, tensor.clone()) if name == "lm_head.weight" else tensor

    monkeypatch.setattr(
        vllm_engine.VllmEngine, "load_weights", lambda engine, weights: load(engine, stale_head(weights))
    )
    causes = stopped(tmp_path / "run", dtype, "--rollout.engine=vllm")
    assert causes.startswith("tied embeddings whose lm_head.weight")
    assert first["lm_head.weight"].shape == torch.Size([18, 64])


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_adapter_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    load = vllm_engine.VllmAdapterEngine.load_adapter

    def drop(engine: vllm_engine.VllmAdapterEngine, folder: Path) -> None:
        load(engine, folder)
        engine._adapter = None  # requests that name no adapter are answered by the base, without complaint

    monkeypatch.setattr(vllm_engine.VllmAdapterEngine, "load_adapter", drop)
    flags = ["--rollout.engine=vllm", "--rollout.vllm.lora=adapter", "--model.lora.rank=8"]
    assert stopped(tmp_path / "run", dtype, *flags).startswith("a LoRA adapter that never reached the sampler")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_that_forgets_the_adapter_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    load, first = TransformersEngine.load_weights, {}

    def without_adapter(engine: TransformersEngine, weights: Iterable[tuple[str, Tensor]]) -> None:
        load(engine, ((name, first.setdefault(name, tensor.clone())) for name, tensor in weights))

    monkeypatch.setattr(TransformersEngine, "load_weights", without_adapter)
    assert stopped(tmp_path / "run", dtype, "--model.lora.rank=8").startswith("a LoRA adapter that was not merged")


@pytest.mark.parametrize("gap", [2e-3, math.inf])
def test_an_update_that_did_not_reach_a_server_ahead_of_the_trainer_stops_too(gap: float) -> None:
    check_after_sync(config(), {})
    check_after_sync(config(), after_sync(9e-4, 1e-4))
    with pytest.raises(
        MismatchError, match=r"mismatch/after_sync( = 0.002 is above rollout.parity.max_abs|_mean = inf)"
    ):
        check_after_sync(config(), after_sync(gap, gap))


def test_in_bfloat16_mean_and_percentile_after_a_sync_are_held_against_their_limits() -> None:
    half = config("--model.dtype=bfloat16")
    check_after_sync(half, after_sync(3.0, 0.01, 0.4))
    with pytest.raises(MismatchError, match=r"mismatch/after_sync_mean = 0.06 is above rollout.parity.mean_abs = 0.05"):
        check_after_sync(half, after_sync(0.4, 0.06))
    with pytest.raises(MismatchError, match=r"mismatch/after_sync_p999 = 0.6 is above rollout.parity.p999_abs = 0.5"):
        check_after_sync(half, after_sync(0.7, 0.01, 0.6))
