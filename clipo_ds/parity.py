"""The parity probe: sampler and trainer are the same model, or the run stops.

Every rollout batch is scored by the trainer anyway, so that its log-probabilities of the sampled tokens can be held
against the sampler's own costs nothing (`mismatch/…` in `clipo_ds.metrics`). What they differ by is rounding, unless
the sampler has other weights than the trainer. Layer L3, imports schema and types only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from clipo_ds.schema import TrainConfig
from clipo_ds.types import MismatchError

FLOAT32 = {"max_abs": 1e-3}
# The largest of a hundred thousand roundings to bfloat16 passes 0.5 in a run where nothing is wrong, and grows with
# their number; the mean and the 99.9th percentile do not.
BFLOAT16 = {"mean_abs": 0.05, "p999_abs": 0.5}
FIGURES = {"mean_abs": "mean", "p999_abs": "99.9th percentile", "max_abs": "largest"}
AFTER_SYNC = {"mean_abs": "after_sync_mean", "p999_abs": "after_sync_p999", "max_abs": "after_sync"}  # metric by limit


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
    auto = BFLOAT16 if "bfloat16" in (config.model.dtype, config.sampler_dtype) else FLOAT32
    given: dict[str, float | str | None] = {name: getattr(config.rollout.parity, name) for name in FIGURES}
    chosen = {name: auto.get(name) if isinstance(limit, str) else limit for name, limit in given.items()}
    return {name: limit for name, limit in chosen.items() if limit is not None}


def check_parity(
    config: TrainConfig, metrics: Mapping[str, float], *, tied_head: bool = False, stale: bool = False
) -> None:
    """Hold what `metrics.mismatch_metrics` measured over all ranks against the limits.

    Args:
        config: Says the limits and the precision of both sides.
        metrics: `mismatch/…`, the same on all ranks: so all of them raise or none.
        tied_head: As `likely_causes`.
        stale: The rollouts are known to come from older weights, and differ by right: no limit is checked.

    Raises:
        MismatchError: A limit is exceeded; or the trainer's log-probabilities are no numbers, whatever the limits.
    """
    _check(config, {name: f"mismatch/{name}" for name in FIGURES}, metrics, tied_head=tied_head, stale=stale)


def check_after_sync(config: TrainConfig, metrics: Mapping[str, float], *, tied_head: bool = False) -> None:
    """Hold what was measured right after a sync (`mismatch/after_sync…`), where rollouts are a step old, against the
    limits; nothing where nothing was measured.

    Raises:
        MismatchError: As `check_parity`.
    """
    names = {name: f"mismatch/{metric}" for name, metric in AFTER_SYNC.items()}
    if names["max_abs"] in metrics:
        _check(config, names, metrics, tied_head=tied_head, stale=False)


def _check(
    config: TrainConfig, names: dict[str, str], metrics: Mapping[str, float], *, tied_head: bool, stale: bool
) -> None:
    """Check the metrics that `names` gives for each of `FIGURES`."""
    if not math.isfinite(metrics[names["max_abs"]]):  # a mean over no token is no number either, and no fault
        raise MismatchError(
            f"{names['mean_abs']} = {metrics[names['mean_abs']]:.3g}: the trainer gives sampled tokens "
            "log-probabilities that are not finite. Its weights or its forward pass are broken"
        )
    figures = ", ".join(f"{figure} {metrics[names[name]]:.3g}" for name, figure in FIGURES.items())
    for name, limit in parity_limits(config).items():
        value = metrics[names[name]]
        if value > limit and not stale:
            causes = ", or ".join(likely_causes(config, tied_head=tied_head))
            raise MismatchError(
                f"{names[name]} = {value:.3g} is above rollout.parity.{name} = {limit:g} ({figures}): sampler and "
                f"trainer are not the same model. Where to look, the likeliest first: {causes}"
            )
