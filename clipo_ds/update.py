"""The second half of a training step: the policy's optimiser steps on one scored rollout batch.

Every mean that crosses micro-batches or ranks is a sum divided by the mini-batch's *global* count, so the gradient
does not depend on how the rows are split. Rows that can feel no gradient (advantage 0 and no KL or embedding term)
are left out of the loss, and out of passes made for it, but stay in the denominators: the gradient is the same and the
time is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipo_ds import distributed
from clipo_ds.batching import split_mini_batches
from clipo_ds.distributed import Ranks
from clipo_ds.experience import Experience, micro_batches
from clipo_ds.objectives import (
    ObjectiveSpec,
    importance_weights,
    kl_estimate,
    loss_denominator,
    loss_sum,
    token_losses,
)
from clipo_ds.policy import Policy, Scores
from clipo_ds.schema import TrainConfig


@dataclass(frozen=True)
class Targets:
    """What the update pulls the N rollouts of this rank towards."""

    advantages: Tensor  # Float[N]
    zero_variance: Tensor  # Bool[N], the rewards of the row's group are all equal
    pooled_gradient: Tensor | None  # Float[N, H], gradient of the contrastive loss in the pooled states


def update_policy(
    config: TrainConfig,
    spec: ObjectiveSpec,
    policy: Policy,
    ranks: Ranks,
    experience: Experience,
    targets: Targets,
    *,
    pad_token_id: int,
    step: int,
) -> dict[str, float]:
    """Take all optimiser steps on one rollout batch; called by all ranks. Returns the `policy/…` metrics.

    Raises:
        FloatingPointError: A gradient is not finite; the message names epoch and mini-batch, and no weight has changed
            since the last finite optimiser step.
    """
    sums = {"loss": 0.0, "kl_reference": 0.0, "kl_old": 0.0, "clip_low": 0.0, "clip_high": 0.0, "tokens": 0.0}
    norms: list[float] = []
    share = ranks.share(config.rollout.prompts_per_step)
    weights = None
    if config.importance_cap is not None:
        weights = importance_weights(
            experience.old_logprobs, experience.rollout_logprobs, experience.mask, config.importance_cap
        )
    feels_gradient = _feels_gradient(config, experience, targets).tolist()
    for epoch in range(config.optimizer.epochs_per_batch):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1009 + epoch)
        split = split_mini_batches(
            len(share), config.rollout.group_size, config.optimizer.mini_batches,
            first_group=share.start, generator=generator,
        )  # fmt: skip
        for index, rows in enumerate(split):
            denominator = _global_denominator(spec, experience, rows, ranks)
            active = [row for row in rows if feels_gradient[row]]
            for part in _passes(config, policy, ranks, experience, active, pad_token_id):
                if part.rows:
                    loss = _micro_batch_loss(config, spec, experience, targets, part, denominator, weights, sums)
                else:
                    loss = (part.scores.logprobs.sum() + part.scores.pooled.sum()) * 0.0
                policy.backward(loss, last=part.is_last)
            try:
                norms.append(policy.step())
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error} (epoch {epoch}, mini-batch {index} of this rollout batch)"
                ) from error
    totals = distributed.sum_over_ranks(sums, ranks.device)
    num_updates = len(norms)
    tokens = max(totals["tokens"], 1.0)
    metrics = {
        "policy/loss": totals["loss"] / num_updates,
        "policy/grad_norm": sum(norms) / num_updates,
        "policy/clip_low": totals["clip_low"] / tokens,
        "policy/clip_high": totals["clip_high"] / tokens,
        "policy/kl_old": totals["kl_old"] / tokens,
        "policy/learning_rate": policy.learning_rate,
    }
    if config.objective.kl_coefficient > 0:
        metrics["policy/kl_reference"] = totals["kl_reference"] / tokens
    return metrics


@dataclass(frozen=True)
class _Pass:
    """A forward pass that waits for its backward pass."""

    rows: Sequence[int]  # [R], positions in the rank's flat list of rollouts; none where the pass only keeps step
    scores: Scores  # of these rows
    is_last: bool  # of the mini-batch


def _passes(
    config: TrainConfig,
    policy: Policy,
    ranks: Ranks,
    experience: Experience,
    active: list[int],
    pad_token_id: int,
) -> Iterator[_Pass]:
    """The mini-batch's forward passes over its active rows, each of them made when it is asked for."""
    live = experience.live
    if live is not None:
        learning = set(active)
        places = [place for place, row in enumerate(live.rows) if row in learning]
        scores = live.scores
        if places:
            scores = Scores(scores.logprobs[places], scores.entropy[places], scores.pooled[places])
        yield _Pass([live.rows[place] for place in places], scores, is_last=True)
        return
    batches = micro_batches(config, policy, ranks, experience.flat, active, pad_token_id)
    for position, batch in enumerate(batches, start=1):
        scores = policy.forward(batch, pooled_gradient=config.pooled_states_learn)
        yield _Pass(() if batch.is_padding else batch.rows, scores, is_last=position == len(batches))


def _micro_batch_loss(
    config: TrainConfig,
    spec: ObjectiveSpec,
    experience: Experience,
    targets: Targets,
    part: _Pass,
    denominator: float,
    weights: Tensor | None,
    sums: dict[str, float],
) -> Tensor:
    """This micro-batch's part of the global loss; adds what it saw to `sums`."""
    rows, scores = torch.tensor(part.rows), part.scores
    width = scores.logprobs.shape[1]
    device = scores.logprobs.device
    mask = experience.mask[rows, :width].to(device)
    old = experience.old_logprobs[rows, :width].to(device)
    terms = token_losses(
        scores.logprobs,
        old,
        targets.advantages[rows].to(device),
        mask,
        spec,
        weight=None if weights is None else weights[rows, :width].to(device),
    )
    loss = loss_sum(terms.loss, mask, spec.aggregation) / denominator
    if config.objective.kl_coefficient > 0 and experience.reference_logprobs is not None:
        reference = experience.reference_logprobs[rows, :width].to(device)
        kl = kl_estimate(scores.logprobs, reference, config.objective.kl_kind)
        if not config.objective.kl_on_zero_variance:
            kl = kl * (~targets.zero_variance[rows]).to(device)[:, None]
        loss = loss + config.objective.kl_coefficient * loss_sum(kl, mask, spec.aggregation) / denominator
        sums["kl_reference"] += float((kl.detach() * mask).sum())
    if targets.pooled_gradient is not None and config.contrastive is not None:
        # The chain rule through the pooled states, exact at the first update. A mini-batch holds its share of the
        # rows, so the factor keeps the term's size against the policy loss whatever the number of mini-batches.
        pull = (scores.pooled * targets.pooled_gradient[rows.to(device)]).sum()
        loss = loss + config.contrastive.policy_loss_weight * config.optimizer.mini_batches * pull
    sums["loss"] += float(loss.detach())
    # The tokens are samples of the old policy, so it is the KL from there that they estimate.
    sums["kl_old"] += float((kl_estimate(old, scores.logprobs.detach(), "k3") * mask).sum())
    sums["clip_low"] += float((terms.clipped_low & mask).sum())
    sums["clip_high"] += float((terms.clipped_high & mask).sum())
    sums["tokens"] += float(mask.sum())
    return loss


def _feels_gradient(config: TrainConfig, experience: Experience, targets: Targets) -> Tensor:
    """Bool[N]: the rows whose gradient is not 0 for certain."""
    feels = targets.advantages != 0
    if targets.pooled_gradient is not None:
        feels |= (targets.pooled_gradient != 0).any(1).cpu()
    if config.objective.kl_coefficient > 0:
        feels |= torch.ones_like(feels) if config.objective.kl_on_zero_variance else ~targets.zero_variance
    return feels & experience.mask.any(1) & ~experience.dropped


def _global_denominator(spec: ObjectiveSpec, experience: Experience, rows: list[int], ranks: Ranks) -> float:
    counted = [row for row in rows if not experience.dropped[row]]
    local = loss_denominator(experience.mask[counted], spec.aggregation, spec.constant_length) if counted else 0.0
    total = distributed.sum_over_ranks({"denominator": float(local)}, ranks.device)["denominator"]
    return max(total, 1.0)
