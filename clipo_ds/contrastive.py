"""Contrastive losses over rollouts, the reward made of them, and the head that embeds pooled states.

What CLIPO (arXiv 2603.10101) computes: a correct rollout is an anchor, its correct siblings are its positives, and a
low contrastive loss earns reward. Imports torch and the L0 files above.

Where it departs from the paper and its published code:
- sums of exponentials stay in log space and leave the anchor itself out before the maximum is taken, so that a low
  temperature gives right values; the published log(x + 1e-8) does not;
- group level works group by group and never builds an N x N matrix; the other levels go over it in tiles;
- no valid anchor gives 0 and a backward pass, where the published code stops;
- `denominator: negatives`, `debias`, group-centred rewards and the shuffled placebo are additions, off by default.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from clipo_ds.contrastive_kernels import Anchors, Form, group_losses, tiled_losses, valid_anchors
from clipo_ds.grouping import (
    check_choice,
    check_count,
    check_finite,
    check_float,
    check_group,
    check_mask,
    check_number,
    check_positive,
    dense_groups,
    describe,
    group_sum,
)

LOSSES = ("infonce", "supcon_out", "supcon_in", "soft_nn")
LEVELS = ("group", "batch", "cross")
SIMILARITIES = ("cosine", "l2")
DENOMINATORS = ("all", "negatives")
DEBIAS_KINDS = ("none", "group_mean", "layer_norm")
HEAD_KINDS = ("linear", "mlp", "none")
SMALLEST_LENGTH = 1e-12  # a shorter vector has no direction


@dataclass(frozen=True)
class ContrastiveLoss:
    """Loss of N rollouts as anchors."""

    per_rollout: Float[Tensor, " N"]  # 0 where not valid
    valid: Bool[Tensor, " N"]  # correct, with a positive and with something to tell it from

    @property
    def mean(self) -> Float[Tensor, ""]:
        """Mean over the valid anchors of these rollouts; a backward-able 0 where there are none."""
        return self.per_rollout.sum() / self.valid.sum().clamp(min=1)


@dataclass(frozen=True)
class SimilaritySums:
    """Cosines of unordered pairs within groups, as sums and counts that add up over ranks."""

    positive_sum: float  # correct-correct pairs
    positive_count: int
    negative_sum: float  # correct-wrong pairs
    negative_count: int


def contrastive_loss(
    embeddings: Float[Tensor, "N D"],
    correct: Bool[Tensor, " N"],
    group: Int[Tensor, " N"],
    *,
    loss: str = "infonce",
    level: str = "group",
    similarity: str = "cosine",
    denominator: str = "all",
    temperature: float = 0.05,
    generator: torch.Generator | None = None,
) -> ContrastiveLoss:
    """Contrastive loss of every correct rollout (CLIPO, arXiv 2603.10101).

    s_ij = similarity / temperature, with cosine z_i·z_j or l2 1 - √max(2 - 2 z_i·z_j, 1e-8). P(i) are the positives of
    anchor i, A(i) the others, neither with i itself:

        level    P(i)                    A(i)             anchors: correct rollouts with a positive
        group    correct, same group     same group       and with a non-positive in A(i)
        batch    correct, whole batch    whole batch
        cross    correct, same group     whole batch

        infonce      l_i = -s_ip + logsumexp_A s_ia,  one p drawn uniformly from P(i)           (1807.03748 eq. 4)
        supcon_out   l_i = -mean_P s_ip + logsumexp_A s_ia, the expectation of infonce over p   (2004.11362 eq. 2)
        supcon_in    l_i = -logsumexp_P s_ip + log|P(i)| + logsumexp_A s_ia                     (2004.11362 eq. 3)
        soft_nn      l_i = -logsumexp_P s_ip + logsumexp_A s_ia                                 (1902.01889 eq. 1)

    With `denominator: negatives` (decoupled, arXiv 2110.06848) the positives leave A(i) in all four: negatives alone
    stand under the fraction, so that like-minded siblings cost an anchor nothing. Where positives and negatives are
    alike the loss is then about log|A(i)|; where they are told apart it falls below 0, and its reward may be positive.

    Args:
        embeddings: Float[N, D], rows of length 1 (or 0); float32 or float64, the dtype is kept.
        correct: Bool[N], the verifier's verdicts.
        group: Int[N], any labels in any order; groups may differ in size.
        loss: infonce | supcon_out | supcon_in | soft_nn.
        level: group | batch | cross. Group level takes time and memory in proportion to N times the group size, the
            others N² time and N D memory.
        similarity: cosine | l2.
        denominator: all | negatives.
        temperature: Positive; similarities are divided by it.
        generator: Draws infonce's positives with one `torch.rand(N, dtype=torch.float64)`; row i uses number i. None is
            a generator with seed 0: the same draw at every call, and never the global generator.

    Raises:
        ValueError: Wrong shape or dtype, an unknown word, temperature not positive, embeddings not finite.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> verdicts = torch.tensor([True, True, False])
    >>> contrastive_loss(z, verdicts, torch.tensor([7, 7, 7]), temperature=1.0).per_rollout  # log(e + 1) - 1
    tensor([0.3133, 0.3133, 0.0000])
    >>> contrastive_loss(z, verdicts, torch.tensor([7, 7, 8])).mean  # no anchor has a wrong sibling
    tensor(0.)
    """
    check_choice(loss, "loss", LOSSES)
    check_choice(level, "level", LEVELS)
    check_choice(similarity, "similarity", SIMILARITIES)
    check_choice(denominator, "denominator", DENOMINATORS)
    check_positive(temperature, "temperature")
    _check_rows(embeddings, "embeddings", correct, group)
    form = Form(loss, similarity, denominator, temperature)
    device = embeddings.device
    correct, groups = correct.to(device), dense_groups(group.to(device))
    draw = torch.zeros(len(correct), device=device)
    if loss == "infonce":
        draw = _uniform(len(correct), generator or torch.Generator().manual_seed(0), device)
    anchors = Anchors(correct, valid_anchors(correct, groups, level), draw)
    with torch.autocast(device.type, enabled=False):
        if level == "group":
            per_rollout = group_losses(embeddings, anchors, groups, form)
        else:
            label = groups.index if level == "cross" else torch.zeros_like(groups.index)
            per_rollout = tiled_losses(embeddings, anchors, label, form)
    return ContrastiveLoss(per_rollout, anchors.valid)


def contrastive_reward(
    per_rollout: Float[Tensor, " N"],
    valid: Bool[Tensor, " N"],
    *,
    weight: float = 0.2,
    floor: float = -0.5,
    bonus: float = 0.0,
) -> Float[Tensor, " N"]:
    """c_i = max(floor, bonus - weight · l_i) for valid anchors, 0 otherwise (CLIPO, arXiv 2603.10101). No gradient.

    Args:
        per_rollout: Float[N], contrastive losses.
        valid: Bool[N].
        weight: λ, at least 0.
        floor: Lowest reward, at most 0; -inf is none.
        bonus: Reward of a valid anchor at loss 0.

    Raises:
        ValueError: Wrong shape or dtype, a number out of range, a valid loss that is not finite.

    >>> contrastive_reward(torch.tensor([1.0, 4.0, 0.0]), torch.tensor([True, True, False]))
    tensor([-0.2000, -0.5000,  0.0000])
    """
    check_number(bonus, "bonus", "a finite number", low=-sys.float_info.max, high=sys.float_info.max)
    losses = _checked_losses(per_rollout, valid, weight, floor)
    return torch.where(valid, (bonus - weight * losses).clamp(min=floor), 0.0)


def centred_contrastive_reward(
    per_rollout: Float[Tensor, " N"],
    valid: Bool[Tensor, " N"],
    group: Int[Tensor, " N"],
    *,
    weight: float = 0.2,
    floor: float = -0.5,
) -> Float[Tensor, " N"]:
    """c_i = clip(-weight · (l_i - mean of l over the group's valid anchors), floor, -floor), 0 where not valid.

    Centred, the reward orders the anchors of a group from the first step, when all losses lie near log G. No gradient.

    Raises:
        ValueError: As `contrastive_reward`.

    >>> losses, group = torch.tensor([2.0, 4.0, 9.0]), torch.tensor([0, 0, 1])
    >>> centred_contrastive_reward(losses, torch.tensor([True, True, True]), group)
    tensor([ 0.2000, -0.2000,  0.0000])
    """
    losses = _checked_losses(per_rollout, valid, weight, floor)
    check_group(group, len(valid))
    groups = dense_groups(group.to(losses.device))
    mean = group_sum(losses, groups) / group_sum(valid.to(losses.dtype), groups).clamp(min=1)
    return torch.where(valid, (weight * (mean[groups.index] - losses)).clamp(floor, -floor), 0.0)


def shuffle_within_groups(
    reward: Float[Tensor, " N"], valid: Bool[Tensor, " N"], group: Int[Tensor, " N"], *, generator: torch.Generator
) -> Float[Tensor, " N"]:
    """Permute the rewards of each group's valid anchors among them: the placebo of a controlled comparison.

    Every anchor keeps a reward of its own group, so group means, spreads and the share at the floor stay as they were.

    Args:
        reward: Float[N].
        valid: Bool[N]; rewards of other rows stay where they are.
        group: Int[N].
        generator: Draws one `torch.rand(N, dtype=torch.float64)`.

    Raises:
        ValueError: Wrong shape or dtype.

    >>> reward, valid = torch.tensor([-0.1, -0.2, 0.0, -0.3]), torch.tensor([True, True, False, True])
    >>> shuffle_within_groups(reward, valid, torch.tensor([0, 0, 0, 1]), generator=torch.Generator().manual_seed(0))
    tensor([-0.2000, -0.1000,  0.0000, -0.3000])
    """
    check_float(reward, "reward", (None,), "N")
    check_mask(valid, "valid", (len(reward),), "N")
    check_group(group, len(reward))
    anchors = valid.nonzero().squeeze(1)
    label = group.to(reward.device)[anchors]
    key = _uniform(len(reward), generator, reward.device)[anchors]
    by_position = anchors[label.argsort(stable=True)]
    by_key = key.argsort(stable=True)
    shuffled = anchors[by_key[label[by_key].argsort(stable=True)]]
    return reward.index_copy(0, by_position, reward[shuffled])


def debias_states(states: Float[Tensor, "N H"], group: Int[Tensor, " N"], kind: str) -> Float[Tensor, "N H"]:
    """What is done to pooled states before the head, because those of one group are almost parallel. Differentiable.

        none        h_i
        group_mean  h_i - mean of h over the group; what all siblings share, the prompt above all, goes
        layer_norm  (h_i - mean_H h_i) / √(var_H h_i + 1e-5)

    Raises:
        ValueError: Wrong shape or dtype, unknown kind.

    >>> debias_states(torch.tensor([[1.0, 4.0], [3.0, 0.0]]), torch.tensor([0, 0]), "group_mean")
    tensor([[-1.,  2.],
            [ 1., -2.]])
    """
    check_choice(kind, "debias", DEBIAS_KINDS)
    check_float(states, "states", (None, None), "N, H")
    check_group(group, len(states))
    if kind == "layer_norm":
        return F.layer_norm(states, states.shape[1:])
    if kind == "none":
        return states
    groups = dense_groups(group.to(states.device))
    return states - (group_sum(states, groups) / groups.size[:, None]).index_select(0, groups.index)


class ContrastiveHead(nn.Module):
    """Maps pooled states [N, H] to embeddings [N, D] with rows of length 1; a zero state gives a zero row.

        linear  z = W h / |W h|, without bias (the published head)
        mlp     z = normalise(W₂ relu(W₁ h + b₁) + b₂), W₁ square
        none    z = h / |h|; no weights, `output_size` is not used

    Works in float32 whatever the states' dtype, or in float64 for float64 states, and outside of autocast. The first
    weights come from torch's global generator: fork it to keep other streams as they are.

    Args:
        hidden_size: H, at least 1.
        output_size: D, at least 1.
        kind: linear | mlp | none.

    Raises:
        ValueError: An unknown kind or a size below 1; on the call, states that are not Float[N, H].

    >>> ContrastiveHead(2, kind="none")(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    def __init__(self, hidden_size: int, output_size: int = 512, kind: str = "linear") -> None:
        super().__init__()
        check_choice(kind, "kind", HEAD_KINDS)
        check_count(hidden_size, "hidden_size")
        check_count(output_size, "output_size")
        self.kind = kind
        self.hidden_size = hidden_size
        layers: list[nn.Linear] = []
        if kind == "linear":
            layers = [nn.Linear(hidden_size, output_size, bias=False)]
        elif kind == "mlp":
            layers = [nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, output_size)]
        self.layers = nn.ModuleList(layers)

    def forward(self, states: Float[Tensor, "N H"]) -> Float[Tensor, "N D"]:
        if states.ndim != 2 or states.shape[1] != self.hidden_size or not states.is_floating_point():
            raise ValueError(
                f"`states` must be floating point of shape [N, {self.hidden_size}], got {describe(states)}"
            )
        values = states.to(torch.promote_types(states.dtype, torch.float32))
        with torch.autocast(values.device.type, enabled=False):
            for index, layer in enumerate(self.layers):
                assert isinstance(layer, nn.Linear)
                bias = None if layer.bias is None else layer.bias.to(values.dtype)
                values = F.linear(values.relu() if index > 0 else values, layer.weight.to(values.dtype), bias)
            return _unit_rows(values)


def within_group_similarity(
    vectors: Float[Tensor, "N D"], correct: Bool[Tensor, " N"], group: Int[Tensor, " N"]
) -> SimilaritySums:
    """Cosines of correct-correct and of correct-wrong pairs of the same group; divide sum by count for the mean.

    Needs no pairs: with S the sum of unit vectors, the correct-correct ones add up to (|S|² - Σ|z|²) / 2 and the
    correct-wrong ones to S·S'. A zero vector has cosine 0 with everything. No gradient.

    Raises:
        ValueError: Wrong shape or dtype, vectors not finite.

    >>> within_group_similarity(torch.eye(2)[[0, 0, 1]], torch.tensor([True, True, False]), torch.tensor([0, 0, 0]))
    SimilaritySums(positive_sum=1.0, positive_count=1, negative_sum=0.0, negative_count=2)
    """
    _check_rows(vectors, "vectors", correct, group)
    with torch.no_grad():
        right = correct.to(vectors.device)
        groups = dense_groups(group.to(vectors.device))
        unit = _unit_rows(vectors)
        sum_right = group_sum(unit * right[:, None], groups).double()
        sum_wrong = group_sum(unit * ~right[:, None], groups).double()
        num_right = group_sum(right.long(), groups)
        positive = ((sum_right**2).sum() - (unit[right].double() ** 2).sum()) / 2
        return SimilaritySums(
            positive_sum=float(positive),
            positive_count=int((num_right * (num_right - 1) // 2).sum()),
            negative_sum=float((sum_right * sum_wrong).sum()),
            negative_count=int((num_right * (groups.size - num_right)).sum()),
        )


def _check_rows(vectors: Tensor, name: str, correct: Tensor, group: Tensor) -> None:
    check_float(vectors, name, (None, None), "N, D")
    check_mask(correct, "correct", (len(vectors),), "N")
    check_group(group, len(vectors))
    check_finite(vectors, name)


def _checked_losses(per_rollout: Tensor, valid: Tensor, weight: float, floor: float) -> Tensor:
    """Losses without gradient, 0 where not valid."""
    check_float(per_rollout, "per_rollout", (None,), "N")
    check_mask(valid, "valid", (len(per_rollout),), "N")
    check_number(weight, "weight", "a number of at least 0", low=0.0, high=sys.float_info.max)
    check_number(floor, "floor", "a number of at most 0", high=0.0)
    losses = torch.where(valid, per_rollout.detach(), 0.0)
    check_finite(losses, "per_rollout")
    return losses


def _uniform(num_rows: int, generator: torch.Generator, device: torch.device) -> Float[Tensor, " N"]:
    """One float64 in [0, 1) a row, drawn where the generator lives, so that the numbers do not depend on the device."""
    return torch.rand(num_rows, dtype=torch.float64, generator=generator, device=generator.device).to(device)


def _unit_rows(values: Tensor) -> Tensor:
    """Rows divided by their length; rows of length 0 stay 0 and feel no gradient."""
    length = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return values / torch.where(length > SMALLEST_LENGTH, length, math.inf)
