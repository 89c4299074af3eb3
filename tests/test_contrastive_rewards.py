"""What stands around the contrastive losses: rewards, debiasing, the head, and the sums of similarities."""

from __future__ import annotations

import math

import pytest
import torch
from contrastive_oracle import batches, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from clipo_ds.contrastive import (
    ContrastiveHead,
    centred_contrastive_reward,
    contrastive_loss,
    contrastive_reward,
    debias_states,
    shuffle_within_groups,
    within_group_similarity,
)

# -- rewards ----------------------------------------------------------------------------------------------------------


def test_contrastive_reward_is_clipped_at_the_floor_and_zero_for_rollouts_that_are_no_anchors():
    losses = torch.tensor([0.0, 1.0, 2.5, 3.0, -1.0, math.nan])
    valid = torch.tensor([True, True, True, True, True, False])
    # 0.1 - 0.2 l: 0.1, -0.1, -0.4, then the floor instead of -0.5, and above 0 for a negative loss.
    want = torch.tensor([0.1, -0.1, -0.4, -0.45, 0.3, 0.0])
    torch.testing.assert_close(contrastive_reward(losses, valid, floor=-0.45, bonus=0.1), want)


def test_all_correct_group_gets_no_contrastive_reward():
    z, correct = unit(torch.randn(4, 3)), torch.ones(4, dtype=torch.bool)
    result = contrastive_loss(z, correct, torch.zeros(4, dtype=torch.long))
    assert torch.equal(contrastive_reward(result.per_rollout, result.valid), torch.zeros(4))


@pytest.mark.parametrize("change", [{"weight": -0.1}, {"floor": 0.1}, {"floor": math.nan}, {"bonus": math.inf}])
def test_contrastive_reward_refuses_numbers_out_of_range(change):
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` must be"):
        contrastive_reward(torch.ones(2), torch.ones(2, dtype=torch.bool), **change)


def test_contrastive_reward_refuses_a_loss_that_is_not_finite_and_carries_no_gradient():
    valid = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="`per_rollout` must be finite"):
        contrastive_reward(torch.tensor([1.0, math.nan]), valid)
    with pytest.raises(ValueError, match="`valid` must be a bool tensor"):
        contrastive_reward(torch.ones(2), torch.ones(2))
    assert not contrastive_reward(torch.ones(2, requires_grad=True), valid).requires_grad


def test_centred_reward_is_measured_from_the_mean_of_the_groups_anchors():
    losses = torch.tensor([1.0, 2.0, 9.0, 3.0, 5.0, 100.0], dtype=torch.float64)
    valid = torch.tensor([True, True, False, True, True, True])
    group = torch.tensor([8, 8, 8, 8, -2, -1])
    # Group 8 has the mean 2 without its third row; a lone anchor is its own mean.
    want = torch.tensor([0.2, 0.0, 0.0, -0.2, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(centred_contrastive_reward(losses, valid, group, weight=0.2, floor=-0.5), want)
    # Clipped on both sides.
    want = torch.tensor([0.1, 0.0, 0.0, -0.1, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(centred_contrastive_reward(losses, valid, group, weight=0.2, floor=-0.1), want)


@settings(max_examples=30, deadline=None)
@given(batch=batches(), seed=st.integers(0, 1000))
def test_the_placebo_permutes_rewards_among_the_anchors_of_each_group(batch, seed):
    _, valid, group = batch
    reward = -torch.arange(1.0, len(valid) + 1)
    shuffled = shuffle_within_groups(reward, valid, group, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(shuffled[~valid], reward[~valid])
    for label in group.unique():
        rows = valid & (group == label)
        assert sorted(shuffled[rows].tolist()) == sorted(reward[rows].tolist())


def test_the_placebo_reaches_every_order_equally_often():
    reward, valid, group = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool), torch.zeros(3).long()
    generator = torch.Generator().manual_seed(0)
    orders = [tuple(shuffle_within_groups(reward, valid, group, generator=generator).tolist()) for _ in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and min(counts) > 150  # 200 each; 150 is four standard deviations away


# -- debiasing and the head -------------------------------------------------------------------------------------------


def test_debiasing_does_what_it_says():
    states = torch.tensor([[1.0, 5.0], [3.0, 1.0], [7.0, 7.5]], dtype=torch.float64)
    group = torch.tensor([2, 2, -9])
    assert debias_states(states, group, "none") is states
    want = torch.tensor([[-1.0, 2.0], [1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(debias_states(states, group, "group_mean"), want)
    # Two numbers normalise to -1 and 1, up to the epsilon under the root.
    normalised = debias_states(states, group, "layer_norm")
    torch.testing.assert_close(
        normalised, torch.tensor([[-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]).double(), atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match="`debias` must be one of none, group_mean, layer_norm"):
        debias_states(states, group, "mean")


@pytest.mark.parametrize("kind", ["group_mean", "layer_norm"])
def test_debiasing_passes_a_finite_difference_check(kind):
    states = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    group = torch.tensor([1, 0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda x: debias_states(x, group, kind), (states,))


@pytest.mark.parametrize("kind", ["linear", "mlp", "none"])
@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_head_gives_unit_rows_in_float32_or_better(kind, dtype, out):
    head = ContrastiveHead(6, 4, kind)
    embeddings = head(torch.randn(5, 6, dtype=dtype))
    assert embeddings.dtype == out and embeddings.shape == (5, 6 if kind == "none" else 4)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5, dtype=out))


def test_the_heads_have_the_weights_that_their_kinds_say():
    shapes = {kind: [tuple(p.shape) for p in ContrastiveHead(6, 4, kind).parameters()] for kind in ("linear", "mlp")}
    assert shapes == {"linear": [(4, 6)], "mlp": [(6, 6), (6,), (4, 6), (4,)]}
    assert list(ContrastiveHead(6, kind="none").parameters()) == []
    state = torch.randn(3, 6)
    mlp = ContrastiveHead(6, 4, "mlp")
    first, second = mlp.layers
    torch.testing.assert_close(mlp(state), unit(second(first(state).relu())))


@pytest.mark.parametrize("kind", ["linear", "none"])
def test_a_zero_state_gives_a_zero_row_and_no_gradient(kind):
    states = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    ContrastiveHead(2, 2, kind)(states).sum().backward()
    assert torch.equal(states.grad[0], torch.zeros(2)) and states.grad.isfinite().all()
    assert torch.equal(ContrastiveHead(2, 2, kind)(states)[0], torch.zeros(2))


def test_the_head_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="`kind` must be one of linear, mlp, none, got 'deep'"):
        ContrastiveHead(4, kind="deep")
    with pytest.raises(ValueError, match="`hidden_size` must be a whole number of at least 1, got 0"):
        ContrastiveHead(0)
    with pytest.raises(ValueError, match=r"`states` must be .*\[N, 4\], got float32 of shape \(2, 3\)"):
        ContrastiveHead(4)(torch.zeros(2, 3))


def test_the_head_learns_to_separate_right_from_wrong():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(32, 16, generator=generator)
    correct, group = torch.arange(32) % 8 < 4, torch.arange(32) // 8
    states[correct, 0] += 1.0
    torch.manual_seed(0)
    head = ContrastiveHead(16, 8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = contrastive_loss(head(states), correct, group, loss="supcon_out", temperature=0.2).mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Three positives that share the denominator equally cannot get below log 3.
    assert losses[0] > 1.8 and math.log(3) <= losses[-1] < 1.4


# -- similarity sums --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(batch=batches())
def test_similarity_sums_equal_a_loop_over_pairs(batch):
    z, correct, group = batch
    lengths = torch.arange(1, len(z) + 1, dtype=z.dtype)[:, None]  # cosines do not see them
    sums = within_group_similarity(z * lengths, correct, group)
    same, different = [], []
    for i in range(len(z)):
        for j in range(i):
            if group[i] == group[j] and (correct[i] or correct[j]):
                (same if correct[i] and correct[j] else different).append(float(z[i] @ z[j]))
    assert (sums.positive_count, sums.negative_count) == (len(same), len(different))
    assert sums.positive_sum == pytest.approx(sum(same), abs=1e-9)
    assert sums.negative_sum == pytest.approx(sum(different), abs=1e-9)
