"""Policy objectives: GRPO, Dr. GRPO, DAPO, GSPO and GMPO, their aggregation, KL estimators and importance weights.

A loss is a sum over tokens divided by one denominator: `loss_sum` of every micro-batch over the `loss_denominator` of
the whole batch adds up to `policy_loss` of the whole, however the rows are split. Imports torch and the L0 files above.

Where it departs from the papers: ratios are exp(clamp(δ, -20, 20)), as published trainers do; GSPO's and GMPO's
sequence loss is carried by each of the sequence's tokens, which leaves their own aggregation (sequence mean) as it is
and lets every other apply; dual clip (arXiv 1912.09729) is there for all of them, off by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipo_ds.advantages import NORMALIZATIONS
from clipo_ds.grouping import (
    check_choice,
    check_count,
    check_finite,
    check_float,
    check_mask,
    check_number,
    check_positive,
)

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")
KL_KINDS = ("k1", "k2", "k3")
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far outside of every clip range, far inside of float32
MAX_KL_EXPONENT = 40.0  # exp(40) = 2.4e17: a batch of such tokens still sums to a finite float32


@dataclass(frozen=True)
class ObjectiveSpec:
    """A policy objective with everything decided; `resolve_objective` makes it."""

    name: str  # grpo | dr_grpo | dapo | gspo | gmpo
    clip_low: float = 0.2  # distance of the ratio below 1 (gmpo: of the log-ratio below 0)
    clip_high: float = 0.2  # distance above
    dual_clip: float | None = None  # c > 1: for A < 0 the loss is at most -c A; None is off
    aggregation: str = "sequence_mean"  # sequence_mean | token_mean | constant
    constant_length: int | None = None  # tokens; divisor of the constant aggregation
    advantage_normalize: str = "std"  # std | none, for `group_advantages`
    dynamic_sampling: bool = False  # replace zero-variance groups by fresh ones
    overlong_fraction: float = 0.0  # share of the length cap over which the overlong penalty falls; 0 is off

    def __post_init__(self) -> None:
        check_positive(self.clip_low, "clip_low")
        check_positive(self.clip_high, "clip_high")
        if self.dual_clip is not None:
            check_number(self.dual_clip, "dual_clip", "None or above 1", low=math.nextafter(1.0, 2.0))
        check_choice(self.aggregation, "aggregation", AGGREGATIONS)
        if self.constant_length is not None:
            check_count(self.constant_length, "constant_length", "None or a whole number of at least 1 token")
        check_choice(self.advantage_normalize, "advantage_normalize", NORMALIZATIONS)


# The published defaults, in this place only: 2402.03300, 2503.20783, 2503.14476, 2507.18071, 2507.20673.
PUBLISHED = {
    "grpo": ObjectiveSpec("grpo"),
    "dr_grpo": ObjectiveSpec("dr_grpo", aggregation="constant", advantage_normalize="none"),
    "dapo": ObjectiveSpec(
        "dapo", clip_high=0.28, aggregation="token_mean", dynamic_sampling=True, overlong_fraction=0.2
    ),
    "gspo": ObjectiveSpec("gspo", clip_low=3e-4, clip_high=4e-4),
    "gmpo": ObjectiveSpec("gmpo", clip_low=0.4, clip_high=0.4),
}
OBJECTIVES = tuple(PUBLISHED)


@dataclass(frozen=True)
class TokenLosses:
    """Loss of every response token, before aggregation; 0 and False outside of the mask."""

    loss: Float[Tensor, "N T"]
    clipped_low: Bool[Tensor, "N T"]  # the lower clip cuts this token's gradient (A < 0)
    clipped_high: Bool[Tensor, "N T"]  # the upper clip (A > 0) or the dual clip (A < 0) cuts it


def resolve_objective(
    name: str,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    aggregation: str | None = None,
    constant_length: int | None = None,
    advantage_normalize: str | None = None,
    dynamic_sampling: bool | None = None,
) -> ObjectiveSpec:
    """The published form of an objective with the given fields changed; None keeps the objective's own value.

    Raises:
        ValueError: Unknown objective, or a value out of range; the message names the field.

    >>> resolve_objective("dapo", clip_low=0.1)  # doctest: +ELLIPSIS
    ObjectiveSpec(name='dapo', clip_low=0.1, clip_high=0.28, dual_clip=None, aggregation='token_mean', ...)
    """
    check_choice(name, "objective", OBJECTIVES)
    given: dict[str, Any] = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "aggregation": aggregation,
        "constant_length": constant_length,
        "advantage_normalize": advantage_normalize,
        "dynamic_sampling": dynamic_sampling,
    }
    return replace(PUBLISHED[name], **{field: value for field, value in given.items() if value is not None})


def policy_loss(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, "N T"],
    *,
    objective: str = "grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    aggregation: str | None = None,
    constant_length: int | None = None,
) -> Float[Tensor, ""]:
    """The policy objective of a whole batch, to be minimised.

    `token_losses` has the equations and `loss_denominator` the aggregations. The gradient flows into `logprobs` only.

    Args:
        logprobs: Float[N, T], natural-log probabilities under the policy; what stands outside of the mask is ignored.
        old_logprobs: Float[N, T], those of the policy that the update started from.
        advantages: Float[N].
        mask: Bool[N, T], the response's tokens.
        objective: grpo | dr_grpo | dapo | gspo | gmpo; sets the defaults of the others.
        clip_low: Lower clip distance, positive.
        clip_high: Upper clip distance, positive.
        dual_clip: c > 1, bounds the loss of negative advantages by -c A; None is off.
        aggregation: sequence_mean | token_mean | constant.
        constant_length: Tokens; the `constant` aggregation divides by N x this. None is T, the width of the batch.

    Returns:
        A scalar; a backward-able 0 where the mask is empty.

    Raises:
        ValueError: Wrong shapes or dtypes, an unknown name, a value out of range, or something not finite in the mask.

    >>> logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> advantages = torch.tensor([1.0, -0.5])
    >>> policy_loss(logprobs, logprobs - 0.1, advantages, mask)  # exp(0.1) · (-1 + 0.5) / 2
    tensor(-0.2763)
    >>> policy_loss(logprobs, logprobs - 0.1, advantages, mask, objective="dapo")  # exp(0.1) · (-1 - 1 + 0.5) / 3
    tensor(-0.5526)
    """
    spec = resolve_objective(
        objective,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        constant_length=constant_length,
    )
    _check_batch(logprobs, old_logprobs, advantages, mask)
    check_finite(torch.where(mask, logprobs, 0.0), "logprobs")
    check_finite(torch.where(mask, old_logprobs, 0.0), "old_logprobs")
    check_finite(advantages, "advantages")
    length = max(mask.shape[1], 1) if spec.constant_length is None else spec.constant_length
    terms = token_losses(logprobs, old_logprobs, advantages, mask, spec)
    denominator = loss_denominator(mask, spec.aggregation, length)
    return loss_sum(terms.loss, mask, spec.aggregation) / denominator.clamp(min=1)


def token_losses(
    logprobs: Float[Tensor, "N T"],
    old_logprobs: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, "N T"],
    spec: ObjectiveSpec,
    *,
    weight: Float[Tensor, "N T"] | None = None,
) -> TokenLosses:
    """Loss of every token. With δ = logprob - old_logprob, r = exp(clamp(δ, -20, 20)) and |i| the tokens of sequence i:

        grpo, dr_grpo, dapo:  -min(r A, clip(r, 1 - low, 1 + high) A)          (2402.03300 eq. 3, 2503.14476 eq. 8)
        gspo:  the same with s_i = exp(Σ_t δ / |i|) in the place of r           (2507.18071 eq. 5 and 7)
        gmpo:  -A exp(Σ_t δ' / |i|),  δ' = g min(g δ, g clip(δ, -low, high)),  g = sign A        (2507.20673)
        dual clip:  at most -c A where A < 0                                    (1912.09729)

    gspo and gmpo have one loss a sequence; each of its tokens carries it, so that every aggregation applies.

    Args:
        logprobs: Float[N, T]; the gradient flows here and nowhere else.
        old_logprobs: Float[N, T].
        advantages: Float[N].
        mask: Bool[N, T]; outside of it anything may stand, NaN as well.
        spec: From `resolve_objective`.
        weight: Float[N, T], from `importance_weights`; multiplies the token loss.

    Raises:
        ValueError: Wrong shapes or dtypes. Numbers are not checked here: in a training loop that would wait for the
            device at every micro-batch, and a NaN reaches the gradient norm, which is checked.
    """
    _check_batch(logprobs, old_logprobs, advantages, mask)
    delta = torch.where(mask, logprobs - old_logprobs.detach().to(logprobs.dtype), 0.0)
    advantage = advantages.detach().to(logprobs.dtype)[:, None]  # (N, 1)
    if spec.name == "gmpo":
        loss, low, high = _geometric_mean(delta, advantage, mask, spec)
    else:
        log_ratio = _sequence_mean(delta, mask) if spec.name == "gspo" else delta
        loss, low, high = _clipped(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), advantage, spec)
    if spec.dual_clip is not None:
        bound = -spec.dual_clip * advantage
        capped = (advantage < 0) & (loss > bound)
        loss, high = torch.where(capped, bound, loss), high | capped
    if weight is not None:
        check_float(weight, "weight", tuple(mask.shape), "N, T")
        loss = loss * weight.detach().to(logprobs.dtype)
    return TokenLosses(torch.where(mask, loss, 0.0), low & mask, high & mask)


def loss_sum(token_loss: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"], aggregation: str) -> Float[Tensor, ""]:
    """The numerator of a mean over token losses; sums of micro-batches add up.

        sequence_mean:          Σ_i (Σ_t m_it loss_it) / |i|
        token_mean, constant:   Σ_i Σ_t m_it loss_it

    Raises:
        ValueError: Wrong shape or dtype, unknown aggregation.

    >>> loss_sum(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[True, True], [True, False]]), "sequence_mean")
    tensor(7.)
    """
    check_choice(aggregation, "aggregation", AGGREGATIONS)
    check_mask(mask, "mask", (None, None), "N, T")
    check_float(token_loss, "token_loss", tuple(mask.shape), "N, T")
    loss = torch.where(mask, token_loss, 0.0)
    return _sequence_mean(loss, mask).sum() if aggregation == "sequence_mean" else loss.sum()


def loss_denominator(
    mask: Bool[Tensor, "N T"], aggregation: str, constant_length: int | None = None
) -> Int[Tensor, ""]:
    """What `loss_sum` is divided by; counts of micro-batches and ranks add up. A whole number, so dtypes are kept.

        sequence_mean:  N, every row of the mask; an empty response counts and adds nothing
        token_mean:     Σ_i |i|
        constant:       N · constant_length    (Dr. GRPO, arXiv 2503.20783)

    Raises:
        ValueError: Wrong mask, unknown aggregation, `constant` without a length (the width of a micro-batch will not
            do: it depends on the split).

    >>> loss_denominator(torch.tensor([[True, True], [True, False]]), "token_mean")
    tensor(3)
    """
    check_choice(aggregation, "aggregation", AGGREGATIONS)
    check_mask(mask, "mask", (None, None), "N, T")
    if aggregation == "token_mean":
        return mask.sum()
    length = 1
    if aggregation == "constant":
        check_count(constant_length, "constant_length", "at least 1 token for the constant aggregation")
        length = int(constant_length or 1)
    return torch.tensor(len(mask) * length, device=mask.device)


def kl_estimate(
    logprobs: Float[Tensor, "N T"], ref_logprobs: Float[Tensor, "N T"], kind: str = "k3"
) -> Float[Tensor, "N T"]:
    """Estimate, token by token, of KL(policy ‖ reference) from the policy's own samples (Schulman 2020).

        k1 = logprob - ref,    k2 = k1² / 2,    k3 = exp(-k1) + k1 - 1 ≥ 0

    k1 and k3 are unbiased as values. As a loss the gradient of k1 is zero in expectation; k2 has that of the KL.
    k3 is computed with expm1, which keeps its digits in float32 where the policies are close; its exponent stops at 40.

    Args:
        logprobs: Float[N, T], natural-log probabilities under the policy; the gradient flows here.
        ref_logprobs: Float[N, T], under the reference.
        kind: k1 | k2 | k3.

    Raises:
        ValueError: Wrong shape or dtype, unknown kind.

    >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), "k3")  # e^-1 + 1 - 1
    tensor([[0.3679]])
    """
    check_choice(kind, "kind", KL_KINDS)
    check_float(logprobs, "logprobs", (None, None), "N, T")
    check_float(ref_logprobs, "ref_logprobs", tuple(logprobs.shape), "N, T")
    k1 = logprobs - ref_logprobs.detach().to(logprobs.dtype)
    if kind == "k1":
        return k1
    return k1**2 / 2 if kind == "k2" else torch.expm1((-k1).clamp(max=MAX_KL_EXPONENT)) + k1


def importance_weights(
    old_logprobs: Float[Tensor, "N T"],
    rollout_logprobs: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    cap: float = 2.0,
) -> Float[Tensor, "N T"]:
    """Truncated importance sampling between trainer and sampler: w = min(exp(old_logprob - rollout_logprob), cap).

    It corrects for a sampler whose arithmetic differs from the trainer's; no gradient flows into it.

    Args:
        old_logprobs: Float[N, T], the trainer's log-probabilities before the update.
        rollout_logprobs: Float[N, T], the sampler's, of the same tokens.
        mask: Bool[N, T], the response's tokens; outside of it w = 1.
        cap: Largest weight, positive.

    Raises:
        ValueError: Wrong shape or dtype, `cap` not positive.

    >>> importance_weights(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-3.0, -0.5]]), torch.tensor([[True, True]]))
    tensor([[2.0000, 0.6065]])
    """
    check_positive(cap, "cap")
    check_float(old_logprobs, "old_logprobs", (None, None), "N, T")
    check_float(rollout_logprobs, "rollout_logprobs", tuple(old_logprobs.shape), "N, T")
    check_mask(mask, "mask", tuple(old_logprobs.shape), "N, T")
    gap = torch.where(mask, (old_logprobs - rollout_logprobs).detach(), 0.0)
    weight = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
    return torch.where(mask, weight, 1.0).to(old_logprobs.dtype)


def _check_batch(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> None:
    check_float(logprobs, "logprobs", (None, None), "N, T")
    check_float(old_logprobs, "old_logprobs", tuple(logprobs.shape), "N, T")
    check_float(advantages, "advantages", (len(logprobs),), "N")
    check_mask(mask, "mask", tuple(logprobs.shape), "N, T")


def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sequence's tokens, Float[N, 1]; `values` are 0 outside of the mask, an empty sequence gives 0."""
    return values.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _clipped(ratio: Tensor, advantage: Tensor, spec: ObjectiveSpec) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped loss, and where its lower and its upper clip are active."""
    floor, ceiling = 1 - spec.clip_low, 1 + spec.clip_high
    loss = -torch.minimum(ratio * advantage, ratio.clamp(floor, ceiling) * advantage)
    return loss, (advantage < 0) & (ratio < floor), (advantage > 0) & (ratio > ceiling)


def _geometric_mean(
    delta: Tensor, advantage: Tensor, mask: Tensor, spec: ObjectiveSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """GMPO's loss of each sequence, Float[N, 1], and the tokens whose log-ratio its clips cut, Bool[N, T]."""
    sign = advantage.sign()
    clipped = sign * torch.minimum(sign * delta, sign * delta.clamp(-spec.clip_low, spec.clip_high))
    log_ratio = _sequence_mean(clipped, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    low, high = (advantage < 0) & (delta < -spec.clip_low), (advantage > 0) & (delta > spec.clip_high)
    return -advantage * log_ratio.exp(), low, high
