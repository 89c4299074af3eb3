"""Group-relative advantages: what a rollout earned against its siblings.

Imports torch and `clipo_ds.grouping`. Departs from GRPO's paper (arXiv 2402.03300) in two corners that it leaves open:
a group of one keeps its reward as its advantage, and a group whose rewards are all equal gives exactly 0, where the
formula would divide rounding noise by the epsilon.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipo_ds.grouping import (
    Groups,
    check_choice,
    check_finite,
    check_float,
    check_group,
    check_number,
    dense_groups,
    group_sum,
)

NORMALIZATIONS = ("std", "none")


def group_advantages(
    rewards: Float[Tensor, " N"], group: Int[Tensor, " N"], *, normalize: str = "std", eps: float = 1e-6
) -> Float[Tensor, " N"]:
    """Advantage of each rollout within its group.

        std:   A_i = (R_i - mean_g R) / (std_g R + eps),  std with n - 1 under the root   (arXiv 2402.03300, sec. 4.1.2)
        none:  A_i = R_i - mean_g R                                                       (Dr. GRPO, arXiv 2503.20783)

    A group of one has no siblings to be compared with: A = R (mean 0, std 1). A group whose rewards are all equal gives
    exactly 0.

    Args:
        rewards: Float[N], total rewards; float32 or float64, the dtype is kept (sums run in float64).
        group: Int[N], labels in any order, groups of any size.
        normalize: `std` or `none`.
        eps: Added to the standard deviation, in units of the reward; at least 0.

    Returns:
        Float[N]; empty for no rows.

    Raises:
        ValueError: Wrong shape or dtype, unknown `normalize`, negative `eps`, a reward that is not finite.

    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0, 5.0]), torch.tensor([0, 0, 0, 0, 9]), normalize="none")
    tensor([ 0.5000, -0.5000,  0.5000, -0.5000,  5.0000])
    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0, 5.0]), torch.tensor([0, 0, 0, 0, 9]))
    tensor([ 0.8660, -0.8660,  0.8660, -0.8660,  5.0000])
    """
    check_choice(normalize, "normalize", NORMALIZATIONS)
    check_number(eps, "eps", "a number of at least 0", low=0.0)
    groups = _checked_groups(rewards, group)
    wide = rewards.double()
    size = groups.size[groups.index]
    deviation = wide - (group_sum(wide, groups) / groups.size)[groups.index]
    if normalize == "std":
        # One reward has no n - 1 under the root; its row is replaced below.
        variance = group_sum(deviation**2, groups) / (groups.size - 1).clamp(min=1)
        deviation = deviation / (variance.sqrt() + eps)[groups.index]
    advantages = torch.where(size == 1, wide, deviation)
    return torch.where(_all_equal(rewards, groups), 0.0, advantages).to(rewards.dtype)


def zero_variance_groups(rewards: Float[Tensor, " N"], group: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether the rewards of a row's group are all equal, so that the group teaches nothing.

    A group of one is not counted: its advantage is its reward.

    Raises:
        ValueError: Wrong shape or dtype, a reward that is not finite.

    >>> zero_variance_groups(torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1, 2]))
    tensor([ True,  True, False, False, False])
    """
    return _all_equal(rewards, _checked_groups(rewards, group))


def _checked_groups(rewards: Tensor, group: Tensor) -> Groups:
    check_float(rewards, "rewards", (None,), "N")
    check_group(group, len(rewards))
    check_finite(rewards, "rewards")
    return dense_groups(group.to(rewards.device))


def _all_equal(rewards: Tensor, groups: Groups) -> Tensor:
    """Rows in groups of at least two whose lowest reward is their highest."""
    values, start = rewards.detach(), rewards.new_zeros(len(groups.size))
    lowest = start.scatter_reduce(0, groups.index, values, "amin", include_self=False)
    highest = start.scatter_reduce(0, groups.index, values, "amax", include_self=False)
    return ((lowest == highest) & (groups.size > 1))[groups.index]
