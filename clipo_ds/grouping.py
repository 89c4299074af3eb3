"""Rows that belong together: group labels made dense, sums over groups, and the checks of L0's tensor arguments.

Group labels are any integers in any order; every function of L0 that reads them goes through `dense_groups`, so that
"unsorted", "unequal", "negative" and "huge" mean the same everywhere. Imports torch only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Int, Num
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """N rows in K groups; a group has at least one row."""

    index: Int[Tensor, " N"]  # which group a row belongs to, in [0, K)
    size: Int[Tensor, " K"]  # rows of each group


def dense_groups(group: Int[Tensor, " N"]) -> Groups:
    """Number the groups 0 … K - 1 in the order of their labels.

    >>> dense_groups(torch.tensor([7, -3, 7, 7]))
    Groups(index=tensor([1, 0, 1, 1]), size=tensor([1, 3]))
    """
    _, index, size = torch.unique(group.long(), return_inverse=True, return_counts=True)
    return Groups(index, size)


def group_sum(values: Num[Tensor, " N *rest"], groups: Groups) -> Num[Tensor, " K *rest"]:
    """Sum of each group's rows; differentiable.

    >>> group_sum(torch.tensor([1.0, 2.0, 3.0]), dense_groups(torch.tensor([5, 9, 5])))
    tensor([4., 2.])
    """
    zero = values.new_zeros((len(groups.size), *values.shape[1:]))
    return zero.index_add(0, groups.index, values)


def rows_by_group_size(groups: Groups) -> list[Int[Tensor, "B G"]]:
    """The row numbers of all groups, one matrix for each group size; a line holds one group's rows in rising order.

    Groups of one size need no padding, so one giant group costs the small ones nothing. N rows have at most √(2N)
    different group sizes. Groups that are contiguous and of one size give the numbers 0 … N - 1 in order.

    >>> rows_by_group_size(dense_groups(torch.tensor([4, 4, 1, 4, 1, 0])))
    [tensor([[5]]), tensor([[2, 4]]), tensor([[0, 1, 3]])]
    """
    order = groups.index.argsort(stable=True)
    start = groups.size.cumsum(0) - groups.size
    buckets = []
    for size in groups.size.unique().tolist():
        rows = order[start[groups.size == size][:, None] + torch.arange(size, device=order.device)]
        buckets.append(rows[rows[:, 0].argsort()])
    return buckets


def describe(value: Any) -> str:
    """What an error says it got: a tensor's dtype and shape, anything else as it prints.

    >>> describe(torch.zeros(2, 3))
    'float32 of shape (2, 3)'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return repr(value)


def check_choice(value: Any, name: str, accepted: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the accepted words."""
    if value not in accepted:
        raise ValueError(f"`{name}` must be one of {', '.join(accepted)}, got {value!r}")


def check_number(value: Any, name: str, rule: str, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is a number in [low, high], which `rule` says in words."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}")


def check_positive(value: Any, name: str) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    check_number(value, name, "a finite number above 0", low=math.ulp(0.0), high=sys.float_info.max)


def check_count(value: Any, name: str, rule: str = "a whole number of at least 1") -> None:
    """Raise ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}")


def check_float(value: Any, name: str, shape: tuple[int | None, ...], letters: str) -> None:
    """Raise ValueError unless `value` is a float32 or float64 tensor of this shape (None: any length)."""
    _check_tensor(value, name, shape, letters, (torch.float32, torch.float64), "a float32 or float64 tensor")


def check_mask(value: Any, name: str, shape: tuple[int | None, ...], letters: str) -> None:
    """Raise ValueError unless `value` is a bool tensor of this shape (None: any length)."""
    _check_tensor(value, name, shape, letters, (torch.bool,), "a bool tensor")


def check_group(value: Any, num_rows: int) -> None:
    """Raise ValueError unless `value` is an integer tensor with one label a row."""
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    _check_tensor(value, "group", (num_rows,), "N", integers, "an integer tensor")


def check_finite(value: Tensor, name: str) -> None:
    """Raise ValueError, with the first bad row, unless every number is finite."""
    flat = value.detach().reshape(len(value), math.prod(value.shape[1:]))
    # A sum is finite only if its terms are, and needs no copy of the matrix; a sum that overflowed gets a second look.
    suspects = (~flat.sum(dim=1).isfinite()).nonzero().squeeze(1)
    bad = suspects[~flat[suspects].isfinite().all(dim=1)]
    if len(bad) > 0:
        raise ValueError(f"`{name}` must be finite, got NaN or infinity in {len(bad)} rows, first in row {int(bad[0])}")


def _check_tensor(
    value: Any, name: str, shape: tuple[int | None, ...], letters: str, dtypes: tuple[torch.dtype, ...], kind: str
) -> None:
    fits = (
        isinstance(value, Tensor)
        and value.dtype in dtypes
        and value.ndim == len(shape)
        and all(want is None or have == want for have, want in zip(value.shape, shape, strict=True))
    )
    if not fits:
        known = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"`{name}` must be {kind} of shape [{letters}] = [{known}], got {describe(value)}")
