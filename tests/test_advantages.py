"""Group-relative advantages against hand-worked values, Python's statistics and the golden vectors."""

from __future__ import annotations

import json
import logging
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from clipo_ds.advantages import group_advantages, zero_variance_groups

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "objectives.npz"
logger = logging.getLogger(__name__)


def loop_oracle(rewards, group, normalize, eps):
    advantages = []
    for reward, label in zip(rewards, group, strict=True):
        siblings = [r for r, g in zip(rewards, group, strict=True) if g == label]
        if len(siblings) == 1:
            advantages.append(reward)
        elif len(set(siblings)) == 1:
            advantages.append(0.0)
        else:
            spread = statistics.stdev(siblings) + eps if normalize == "std" else 1.0
            advantages.append((reward - statistics.fmean(siblings)) / spread)
    return advantages


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/golden")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_advantages_equal_the_golden_vectors(dtype, tolerance, record_property):
    arrays = np.load(GOLDEN)
    worst = 0.0
    for case in json.loads(str(arrays["index"])):
        rewards, group, want = (
            torch.from_numpy(arrays[f"{case['case']}_{name}"]) for name in ("rewards", "group", "advantages")
        )
        have = group_advantages(rewards.flatten().to(dtype), group)
        error = float((have - want).abs().max())
        assert have.dtype == dtype and error < tolerance, f"off by {error:.2e} in {case}"
        worst = max(worst, error)
    record_property(f"largest_error_advantages_{dtype}", worst)
    logger.info("golden advantages, %s: largest error %.1e", dtype, worst)


def test_advantages_of_a_group_are_its_standard_scores():
    # 1, 0, 0, 0: mean 1/4, deviations 3/4 and -1/4, variance (9 + 3) / 16 / 3 = 1/4, std 1/2.
    have = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), torch.zeros(4).long(), eps=0.0)
    assert have.tolist() == [1.5, -0.5, -0.5, -0.5]


def test_without_normalisation_only_the_mean_is_taken_off():
    have = group_advantages(torch.tensor([1.0, 0.0, 3.0, 5.0]), torch.tensor([0, 0, 1, 1]), normalize="none")
    assert have.tolist() == [0.5, -0.5, -1.0, 1.0]


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_a_group_of_one_keeps_its_reward_and_is_not_of_zero_variance(normalize):
    rewards, group = torch.tensor([0.7, 1.0, 1.0]), torch.tensor([4, -1, -1])
    assert torch.equal(group_advantages(rewards, group, normalize=normalize), torch.tensor([0.7, 0.0, 0.0]))
    assert zero_variance_groups(rewards, group).tolist() == [False, True, True]


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_equal_rewards_give_exactly_zero_where_their_mean_is_rounded(normalize):
    # Seven times 0.1 has a float32 mean that is not 0.1; over an epsilon of 1e-6 that noise would be an advantage.
    for eps in (1e-6, 0.0):
        have = group_advantages(torch.full((7,), 0.1), torch.zeros(7).long(), normalize=normalize, eps=eps)
        assert torch.equal(have, torch.zeros(7))


def test_large_common_rewards_do_not_drown_small_differences():
    rewards = torch.tensor([1e4, 1e4 + 0.5, 1e4 + 1.0])
    torch.testing.assert_close(
        group_advantages(rewards, torch.zeros(3).long()), torch.tensor([-1.0, 0.0, 1.0]) / 0.500001 / 2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rollouts_have_no_advantages(dtype):
    empty = torch.zeros(0, dtype=dtype)
    assert group_advantages(empty, torch.zeros(0).long()).dtype == dtype
    assert zero_variance_groups(empty, torch.zeros(0).long()).shape == (0,)


rewards_and_groups = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, -0.5, 0.1, 2.25]), st.sampled_from([-(2**31), -1, 0, 5, 2**31 - 1])),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(rows=rewards_and_groups, normalize=st.sampled_from(["std", "none"]), labels=st.sampled_from(["int32", "int64"]))
def test_advantages_equal_a_loop_over_siblings(rows, normalize, labels):
    rewards, group = [r for r, _ in rows], [g for _, g in rows]
    want = torch.tensor(loop_oracle(rewards, group, normalize, 1e-6), dtype=torch.float64)
    label = torch.tensor(group, dtype=getattr(torch, labels))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        have = group_advantages(torch.tensor(rewards, dtype=dtype), label, normalize=normalize)
        assert have.dtype == dtype
        torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)
    equal = [len(s) > 1 and len(set(s)) == 1 for s in ([r for r, h in rows if h == g] for _, g in rows)]
    assert zero_variance_groups(torch.tensor(rewards), label).tolist() == equal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.ones(4, 1)}, r"`rewards` must be .* \[N\]"),
        ({"rewards": torch.ones(4).long()}, "`rewards` must be a float32 or float64 tensor"),
        ({"rewards": torch.tensor([0.0, math.nan, 0.0, 1.0])}, "`rewards` must be finite, .*first in row 1"),
        ({"group": torch.zeros(3).long()}, r"`group` must be .*\[4\], got int64 of shape \(3,\)"),
        ({"group": torch.zeros(4, dtype=torch.bool)}, "`group` must be an integer tensor"),
        ({"normalize": "max"}, "`normalize` must be one of std, none, got 'max'"),
        ({"eps": -1e-6}, "`eps` must be a number of at least 0"),
    ],
)
def test_bad_input_is_named_with_what_would_be_right(change, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(**({"rewards": torch.ones(4), "group": torch.zeros(4).long()} | change))


def test_shapes_hold_when_jaxtyping_checks_them():
    checked = jaxtyped(typechecker=beartype)
    rewards, group = torch.rand(6), torch.arange(6) // 3
    assert (
        checked(group_advantages)(rewards, group).shape == checked(zero_variance_groups)(rewards, group).shape == (6,)
    )
    with pytest.raises(TypeCheckError):
        checked(group_advantages)(rewards, group[1:])
