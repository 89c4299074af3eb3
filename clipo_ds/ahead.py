"""Sampling one step ahead: a thread asks the servers for the next step's rollouts while this step trains.

The thread runs nothing but `sample_round`, which is HTTP and touches no collective; when it starts, when it is awaited
and when weights may change is the loop's to say. The prompts are those that the next step draws, so neither the order
of prompts nor a checkpoint knows of it: a resumed run samples the batch again, with newer weights. Layer L3.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch

from clipo_ds import distributed
from clipo_ds.distributed import Ranks
from clipo_ds.experience import Experience, micro_batches
from clipo_ds.generation import ScoringEngine
from clipo_ds.metrics import percentile_999
from clipo_ds.policy import Policy
from clipo_ds.schema import TrainConfig
from clipo_ds.threads import run_beside
from clipo_ds.types import Group


class Ahead:
    """Holds the rollouts of at most one coming step, ready or on their way.

    Args:
        engine: What samples them; its `generate` touches no collective.
    """

    def __init__(self, engine: ScoringEngine) -> None:
        self.engine = engine
        self._step: int | None = None
        self._rollouts: Future[list[Group]] | None = None

    def start(self, step: int, sample: Callable[[], list[Group]]) -> None:
        """Begin to sample for a step."""
        if self._rollouts is not None:
            raise RuntimeError(f"step {self._step} is sampled already")
        self._step, (self._rollouts,) = step, run_beside([sample])

    def failure(self) -> Exception | None:
        """Wait until nothing is on its way; what went wrong, if anything did."""
        if self._rollouts is None:
            return None
        error = self._rollouts.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        return error

    def take(self, step: int) -> list[Group] | None:
        """The rollouts that were sampled for a step, which are handed out once; None if there are none."""
        if self._rollouts is None or self._step != step:
            return None
        rollouts, self._rollouts = self._rollouts.result(), None
        return rollouts


def gap_after_sync(
    config: TrainConfig,
    policy: Policy,
    engine: ScoringEngine,
    ranks: Ranks,
    experience: Experience,
    *,
    pad_token_id: int,
) -> dict[str, float]:
    """|trainer - server| log-probability, nats, over the longest rollout of each rank, both with the newest weights:
    the largest of any token as `mismatch/after_sync`, the 99.9th percentile of all as `mismatch/after_sync_p999`, the
    largest mean of any server as `mismatch/after_sync_mean`.

    The rollouts that are trained on are a step old, so their own log-probabilities cannot show that an update arrived.
    Called by all ranks, while nothing is being sampled.

    Raises:
        SamplerLost: And whatever else the engine raises, on all ranks.
    """
    lengths = [len(rollout.token_ids) for _, rollout in experience.flat]
    rows = [lengths.index(max(lengths))] if max(lengths, default=0) > 1 else []
    (batch,) = micro_batches(config, policy, ranks, experience.flat, rows, pad_token_id)
    logprobs = policy.score(batch).logprobs.float().cpu()
    gaps = [torch.zeros(0)]
    with distributed.together():
        for row in rows:
            for scores in engine.score(*experience.flat[row]).values():
                # NaN would be lost in a maximum, here or over ranks.
                gaps.append((logprobs[0, : len(scores)] - torch.tensor(scores)).abs().nan_to_num(nan=torch.inf))
    largest = max((float(gap.max()) for gap in gaps[1:]), default=0.0)
    mean = max((float(gap.mean()) for gap in gaps[1:]), default=0.0)
    return {
        "mismatch/after_sync": distributed.max_over_ranks(largest, ranks.device),
        "mismatch/after_sync_mean": distributed.max_over_ranks(mean, ranks.device),
        "mismatch/after_sync_p999": percentile_999(torch.cat(gaps), ranks),
    }
