"""Group labels made dense, rows by group size, and the checks of tensor arguments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipo_ds.grouping import check_finite, check_positive, dense_groups, group_sum, rows_by_group_size

labels = st.lists(st.sampled_from([-(2**63), -3, 0, 1, 2**63 - 1]), max_size=24)


@settings(max_examples=60, deadline=None)
@given(group=labels)
def test_rows_of_a_group_share_a_line_in_rising_order(group):
    groups = dense_groups(torch.tensor(group, dtype=torch.int64))
    lines = [line for rows in rows_by_group_size(groups) for line in rows.tolist()]
    want = [[i for i, g in enumerate(group) if g == label] for label in set(group)]
    assert sorted(lines) == sorted(want)
    assert [line for line in lines if line != sorted(line)] == []
    values = torch.arange(len(group), dtype=torch.float64)
    assert sorted(group_sum(values, groups).tolist()) == sorted(float(sum(line)) for line in want)


@pytest.mark.parametrize("names", [[0, 1, 2], [5, -9, 3]])
def test_equal_contiguous_groups_are_the_rows_in_order_whatever_their_labels(names):
    (rows,) = rows_by_group_size(dense_groups(torch.tensor(names).repeat_interleave(4)))
    assert torch.equal(rows.flatten(), torch.arange(12))


def test_huge_finite_rows_whose_sum_overflows_are_not_called_infinite():
    huge = torch.finfo(torch.float32).max
    check_finite(torch.tensor([[huge, huge], [0.0, 1.0]]), "x")
    with pytest.raises(ValueError, match="`x` must be finite, got NaN or infinity in 1 rows, first in row 1"):
        check_finite(torch.tensor([[huge, huge], [math.inf, -math.inf]]), "x")


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, None, "1"])
def test_what_is_no_positive_number_is_refused(value):
    with pytest.raises(ValueError, match="`x` must be a finite number above 0, got"):
        check_positive(value, "x")
