"""The parity probe: sampler and trainer are the same model, or the run stops.

Every rollout batch is scored by the trainer anyway, so that its log-probabilities of the sampled tokens can be held
against the sampler's own costs nothing (`mismatch/…` in `clipo_ds.metrics`). What they differ by is rounding, unless
the sampler has other weights than the trainer. Layer L3, imports schema and types only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from clipo_ds.schema import ParityConfig, TrainConfig
from clipo_ds.types import MismatchError

FLOAT32_MAX_ABS = 1e-3
BFLOAT16_MAX_ABS = 0.5
BFLOAT16_MEAN_ABS = 0.05
AFTER_SYNC = {"max_abs": "after_sync", "mean_abs": "after_sync_mean"}  # metric by limit


def likely_causes(config: TrainConfig, *, tied_head: bool) -> list[str]:
    """What can make the sampler of a run like this one another model than the trainer, the likeliest first.

    Args:
        config: The run's.
        tied_head: The model's output head is its embedding matrix.
    """
    rollout, sampling, lora = config.rollout, config.sampling, config.model.lora
    on_vllm = rollout.engine != "transformers"
    adapter = rollout.engine == "vllm" and rollout.vllm.lora == "adapter"
    half = "bfloat16" in (config.model.dtype, config.sampler_dtype)
    filtered = (sampling.temperature, sampling.top_p, sampling.top_k) != (1, 1, 0)
    causes = {
        f"rollout.dtype {config.sampler_dtype} beside model.dtype {config.model.dtype}": (
            config.sampler_dtype != config.model.dtype
        ),
        "a LoRA adapter that never reached the sampler (rollout.vllm.lora adapter)": adapter,
        "a LoRA adapter that was not merged into the weights that the sampler got": lora is not None and not adapter,
        # Adapters leave the head alone.
        "tied embeddings whose lm_head.weight the sampler keeps apart and was not sent": (
            tied_head and on_vllm and lora is None
        ),
        "a weight sync that was skipped or left weights out": True,
        "a server that another run fed or that was started again": rollout.engine == "vllm_server",
        "a prefix cache that outlived the sync": on_vllm,
        "sampling.temperature, top_p or top_k inside the sampler's log-probabilities": filtered,
        "a model that scales its output head's input or its logits in a way of its own": True,
        "kernels that round bfloat16 otherwise (float32 shows it; rollout.parity sets the limits)": half,
    }
    return [cause for cause, possible in causes.items() if possible]


def parity_limits(config: TrainConfig) -> dict[str, float]:
    """Limit by metric, `auto` resolved; what is off is left out."""
    half = "bfloat16" in (config.model.dtype, config.sampler_dtype)
    auto: dict[str, float | None] = {
        "max_abs": BFLOAT16_MAX_ABS if half else FLOAT32_MAX_ABS,
        "mean_abs": BFLOAT16_MEAN_ABS if half else None,
    }
    chosen = {name: _resolve(config.rollout.parity, name, value) for name, value in auto.items()}
    return {name: limit for name, limit in chosen.items() if limit is not None}


def check_parity(
    config: TrainConfig, metrics: Mapping[str, float], *, tied_head: bool = False, stale: bool = False
) -> None:
    """Hold a step's `mismatch/max_abs` and `mismatch/mean_abs`, reduced over ranks, against the limits.

    Args:
        config: Says the limits and the precision of both sides.
        metrics: The step's metrics, the same on all ranks: so all of them raise or none.
        tied_head: As `likely_causes`.
        stale: The rollouts are known to come from older weights, and differ by right: nothing is checked.

    Raises:
        MismatchError: A limit is exceeded, or the mismatch is not a number although tokens were sampled.
    """
    if stale:
        return
    # The mean is a sum over ranks, which keeps a NaN; a maximum over ranks may lose it.
    unknown = math.isnan(metrics["mismatch/mean_abs"]) and metrics["response/length"] > 0
    for name, limit in parity_limits(config).items():
        value = math.nan if unknown else metrics[f"mismatch/{name}"]
        if value > limit or unknown:
            _stop(name, value, name, limit, likely_causes(config, tied_head=tied_head))


def check_after_sync(config: TrainConfig, metrics: Mapping[str, float], *, tied_head: bool = False) -> None:
    """Hold what was measured right after a sync (`mismatch/after_sync…`), where rollouts are a step old, against the
    limits; nothing where nothing was measured.

    Raises:
        MismatchError: As `check_parity`.
    """
    for name, limit in parity_limits(config).items():
        value = metrics.get(f"mismatch/{AFTER_SYNC[name]}", 0.0)
        if not value <= limit:
            _stop(AFTER_SYNC[name], value, name, limit, likely_causes(config, tied_head=tied_head))


def _stop(metric: str, value: float, field: str, limit: float, causes: list[str]) -> NoReturn:
    raise MismatchError(
        f"mismatch/{metric} = {value:.3g} is above rollout.parity.{field} = {limit:g}: sampler and trainer are not the "
        f"same model. Where to look, the likeliest first: {', or '.join(causes)}"
    )


def _resolve(config: ParityConfig, name: str, auto: float | None) -> float | None:
    value: float | str | None = getattr(config, name)
    return auto if isinstance(value, str) else value
