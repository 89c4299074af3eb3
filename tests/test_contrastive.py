"""Contrastive losses against a loop oracle and the golden vectors, and the rewards, debiasing and head around them.

The largest errors against ../shared/golden are shown by
`pytest tests/test_contrastive.py -k golden --log-cli-level=INFO`, and are properties of the JUnit report.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped

from clipo_ds import contrastive
from clipo_ds.contrastive import (
    DENOMINATORS,
    LEVELS,
    LOSSES,
    SIMILARITIES,
    ContrastiveHead,
    centred_contrastive_reward,
    contrastive_loss,
    contrastive_reward,
    debias_states,
    shuffle_within_groups,
    within_group_similarity,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "contrastive.npz"
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
logger = logging.getLogger(__name__)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def loop_oracle(z, correct, group, loss, level, similarity, denominator, temperature, draws):
    """The formulas of the docstring, anchor by anchor with lists of rows; returns losses and valid flags."""

    def s(i, rows):
        values = z[rows] @ z[i]
        if similarity == "l2":
            values = 1 - (2 - 2 * values).clamp(min=1e-8).sqrt()
        return values / temperature

    def lse(values):
        top = values.max().detach()
        return top + (values - top).exp().sum().log()

    n = len(correct)
    losses, valid = [z.new_zeros(()) for _ in range(n)], [False] * n
    for i in range(n):
        same = [j for j in range(n) if j != i and group[j] == group[i]]
        everyone = [j for j in range(n) if j != i]
        positives = [j for j in (everyone if level == "batch" else same) if correct[j]]
        others = same if level == "group" else everyone
        negatives = [j for j in others if j not in positives]
        valid[i] = bool(correct[i] and positives and negatives)
        if not valid[i]:
            continue
        losses[i] = lse(s(i, negatives if denominator == "negatives" else others))
        if loss == "infonce":
            losses[i] = losses[i] - s(i, [positives[int(float(draws[i]) * len(positives))]])[0]
        elif loss == "supcon_out":
            losses[i] = losses[i] - s(i, positives).sum() / len(positives)
        else:
            losses[i] = losses[i] - lse(s(i, positives)) + (math.log(len(positives)) if loss == "supcon_in" else 0)
    return torch.stack(losses) if losses else z.new_zeros(0), valid


def oracle_with_gradient(z, correct, group, *form, pull, draws):
    """Oracle losses and the gradient of their sum weighted by `pull`, in float64."""
    leaf = z.detach().clone().requires_grad_()
    losses, valid = loop_oracle(leaf, correct.tolist(), group.tolist(), *form, draws)
    gradient = torch.zeros_like(leaf)
    if any(valid):
        (gradient,) = torch.autograd.grad((losses * pull).sum(), leaf)
    return losses.detach(), valid, gradient


def ours_with_gradient(z, correct, group, *form, pull, seed=0):
    leaf = z.detach().clone().requires_grad_()
    loss, level, similarity, denominator, temperature = form
    result = contrastive_loss(
        leaf,
        correct,
        group,
        loss=loss,
        level=level,
        similarity=similarity,
        denominator=denominator,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    (result.per_rollout * pull.to(z.dtype)).sum().backward()
    return result, leaf.grad


# -- golden vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/golden")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_rewards_equal_the_golden_vectors(dtype, record_property):
    arrays = np.load(GOLDEN)
    worst = {"loss": 0.0, "reward": 0.0, "gradient": 0.0}
    for case in json.loads(str(arrays["index"])):
        names = ("embeddings", "correct", "group", "loss", "valid", "reward")
        z, correct, group, want, valid, reward = (torch.from_numpy(arrays[f"{case['case']}_{n}"]) for n in names)
        form = (case["kind"], case["level"], case["similarity"], "all", case["temperature"])
        pull = valid.double() / max(int(valid.sum()), 1)  # the mean over valid anchors
        result, gradient = ours_with_gradient(z.to(dtype), correct, group, *form, pull=pull)
        assert result.per_rollout.dtype == result.mean.dtype == dtype and torch.equal(result.valid, valid), case
        # The files hold no gradients: the loop oracle, which has the golden values, gives them.
        expected, _, slope = oracle_with_gradient(z, correct, group, *form, pull=pull, draws=torch.zeros(len(z)))
        torch.testing.assert_close(expected, want, rtol=0, atol=1e-9)
        losses = result.per_rollout.detach()
        errors = {
            "loss": (losses - want).abs().max(),
            "reward": (contrastive_reward(losses, result.valid) - reward).abs().max(),
            "gradient": (gradient - slope).abs().max(),
        }
        for name, error in errors.items():
            assert error < TOLERANCE[dtype], f"{name} is off by {float(error):.2e} in {case}"
            worst[name] = max(worst[name], float(error))
    for name, error in worst.items():
        record_property(f"largest_error_{name}_{dtype}", error)
        logger.info("golden contrastive, %s: largest error of the %s %.1e", dtype, name, error)


# -- the loop oracle --------------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    n, dim = draw(st.integers(0, 14)), draw(st.integers(1, 5))
    labels = draw(st.lists(st.sampled_from([-(2**62), -7, 0, 3, 2**62]), min_size=n, max_size=n))
    correct = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    z = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    return unit(z), torch.tensor(correct, dtype=torch.bool), torch.tensor(labels, dtype=torch.long)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=8, deadline=None)
@given(batch=batches(), temperature=st.sampled_from([0.01, 0.05, 0.2, 1.0]))
def test_values_and_gradients_equal_a_loop_over_pairs(loss, denominator, similarity, level, batch, temperature):
    z, correct, group = batch
    form = (loss, level, similarity, denominator, temperature)
    pull = torch.linspace(1.0, 2.0, max(len(z), 1), dtype=torch.float64)[: len(z)]
    draws = torch.rand(len(z), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    want, valid, slope = oracle_with_gradient(z, correct, group, *form, pull=pull, draws=draws)
    for dtype, tolerance in TOLERANCE.items():
        result, gradient = ours_with_gradient(z.to(dtype), correct, group, *form, pull=pull, seed=5)
        assert result.valid.tolist() == valid
        assert result.per_rollout.dtype == gradient.dtype == dtype
        torch.testing.assert_close(result.per_rollout.double(), want, rtol=tolerance, atol=tolerance)
        # The slope is as steep as 1 / temperature, and l2's steeper where embeddings are close.
        torch.testing.assert_close(gradient.double(), slope, rtol=10 * tolerance, atol=tolerance / temperature)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_pass_a_finite_difference_check(loss, level):
    z = unit(torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    correct = torch.tensor([True, True, True, False, False, True, True])
    group = torch.tensor([4, 4, 4, 4, 4, 1, 1])
    for similarity in SIMILARITIES:
        for denominator in DENOMINATORS:
            words = {"loss": loss, "level": level, "similarity": similarity, "denominator": denominator}
            assert torch.autograd.gradcheck(
                lambda x, words=words: contrastive_loss(x, correct, group, temperature=0.3, **words).per_rollout, (z,)
            )


# -- hand-worked values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dissimilar_embeddings_give_the_log_of_the_number_of_others(temperature, dtype):
    # 8 correct (7 positives each) and 8 wrong rollouts, all at cosine 0: every fraction is 1/15. The published code,
    # which adds 1e-8 to exp(-1/temperature), says 2.99 at 0.05 and 31.6 at 0.02.
    correct = torch.arange(16) < 8
    group = torch.zeros(16, dtype=torch.long)
    z = torch.eye(16, dtype=dtype)
    by_loss = {"infonce": math.log(15), "supcon_out": math.log(15), "supcon_in": math.log(15)}
    by_loss["soft_nn"] = math.log(15 / 7)  # 7 of 15 shares are positives
    for loss, want in by_loss.items():
        result = contrastive_loss(z, correct, group, loss=loss, temperature=temperature)
        assert result.mean.item() == pytest.approx(want, abs=1e-6)
    # Decoupled, the 8 negatives alone stand under the fraction.
    assert contrastive_loss(z, correct, group, denominator="negatives").mean.item() == pytest.approx(math.log(8))


def test_an_anchor_pays_for_equal_siblings_unless_the_denominator_holds_negatives_only():
    # k equal positives at cosine 1, one negative at 0, temperature 1: log(k e + 1) - 1 grows with k, -1 does not.
    def loss(num_positives, denominator):
        z = torch.tensor([[1.0, 0.0]] * (num_positives + 1) + [[0.0, 1.0]], dtype=torch.float64)
        correct = torch.tensor([True] * (num_positives + 1) + [False])
        group = torch.zeros(len(z), dtype=torch.long)
        result = contrastive_loss(z, correct, group, loss="supcon_out", denominator=denominator, temperature=1.0)
        return result.per_rollout[0].item()

    assert loss(1, "all") == pytest.approx(math.log(math.e + 1) - 1)
    assert loss(6, "all") == pytest.approx(math.log(6 * math.e + 1) - 1)
    assert loss(1, "negatives") == loss(6, "negatives") == pytest.approx(-1.0)


def test_cross_level_counts_correct_rollouts_of_other_groups_as_others():
    # All at cosine 1, so only counts matter: anchor 0 has one positive and 4 others, one of them its positive.
    z = torch.ones(5, 1, dtype=torch.float64)
    correct = torch.tensor([True, True, True, True, False])
    group = torch.tensor([0, 0, 1, 1, 1])
    assert contrastive_loss(z, correct, group, level="cross").per_rollout[0].item() == pytest.approx(math.log(4))
    decoupled = contrastive_loss(z, correct, group, level="cross", denominator="negatives")
    assert decoupled.per_rollout[0].item() == pytest.approx(math.log(3))
    assert not contrastive_loss(z, correct, group, level="group").valid[0]  # its group has no wrong rollout


# -- corners ----------------------------------------------------------------------------------------------------------


CORNERS = {
    "empty": ([], []),
    "single rollout": ([True], [3]),
    "groups of one": ([True, True, False], [1, 2, 3]),
    "all correct": ([True] * 6, [0, 0, 0, 1, 1, 1]),
    "all wrong": ([False] * 6, [0, 0, 0, 1, 1, 1]),
    "one correct": ([True, False, False, True, False, False], [0, 0, 0, 1, 1, 1]),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_backward_gives_a_zero_gradient_where_nothing_is_valid(corner, loss, similarity):
    correct, group = (torch.tensor(x, dtype=t) for x, t in zip(CORNERS[corner], (torch.bool, torch.int64), strict=True))
    z = torch.ones(len(correct), 2).requires_grad_()
    result = contrastive_loss(z, correct, group, loss=loss, similarity=similarity)
    result.mean.backward()
    assert not result.valid.any() and result.mean.item() == 0.0
    assert torch.equal(result.per_rollout, torch.zeros(len(correct)))
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("level", LEVELS)
def test_identical_embeddings_are_finite_and_right_at_a_low_temperature(dtype, loss, level):
    # Cosine 1 everywhere and distance 0: all shares are equal, and l2, whose slope is cut off at 1e-4, has no gradient.
    # The rows are rounded, so that in float32 z·z is 1 to seven digits only.
    z = (
        unit(torch.randn(1, 512, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
        .to(dtype)
        .repeat(6, 1)
    )
    correct, group = torch.tensor([True, True, True, False, True, False]), torch.zeros(6, dtype=torch.int32)
    want = {"soft_nn": math.log(5 / 3)}.get(loss, math.log(5))
    for similarity in SIMILARITIES:
        leaf = z.clone().requires_grad_()
        words = {"loss": loss, "level": level, "similarity": similarity}
        result = contrastive_loss(leaf, correct, group, temperature=0.01, **words)
        result.per_rollout.sum().backward()
        torch.testing.assert_close(result.per_rollout, torch.where(correct, want, 0.0).to(dtype), atol=1e-4, rtol=0)
        assert leaf.grad.isfinite().all()
        if similarity == "l2":
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_perfectly_separated_groups_reach_a_loss_of_zero_with_a_finite_gradient():
    z = torch.tensor([[1.0, 0.0]] * 2 + [[-1.0, 0.0]] * 2).requires_grad_()
    correct, group = torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.long)
    result = contrastive_loss(z, correct, group, temperature=0.01)  # log(1 + 2 e^-200)
    result.mean.backward()
    assert result.mean.item() == 0.0 and z.grad.isfinite().all()


def test_zero_embeddings_do_not_break_the_loss():
    z = torch.zeros(4, 3).requires_grad_()
    result = contrastive_loss(z, torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.long))
    result.mean.backward()
    assert result.mean.item() == pytest.approx(math.log(3)) and z.grad.isfinite().all()


def test_the_order_of_the_rows_and_the_labels_of_the_groups_do_not_matter():
    generator = torch.Generator().manual_seed(3)
    z = unit(torch.randn(24, 5, dtype=torch.float64, generator=generator))
    correct = torch.rand(24, generator=generator) < 0.5
    group = torch.arange(24) // 4
    shuffle = torch.randperm(24, generator=generator)
    for dtype in (torch.int8, torch.int32, torch.int64):
        labels = (group * 17 - 40).to(dtype)
        plain = contrastive_loss(z, correct, group, loss="soft_nn")
        moved = contrastive_loss(z[shuffle], correct[shuffle], labels[shuffle], loss="soft_nn")
        torch.testing.assert_close(moved.per_rollout, plain.per_rollout[shuffle])
        assert torch.equal(moved.valid, plain.valid[shuffle])


def test_a_low_precision_autocast_region_does_not_touch_the_loss():
    z = unit(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    correct, group = torch.arange(8) % 4 < 2, torch.arange(8) // 4
    head = ContrastiveHead(16, 8)
    for level in LEVELS:
        plain = contrastive_loss(head(z), correct, group, level=level).per_rollout
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = contrastive_loss(head(z), correct, group, level=level).per_rollout
        assert torch.equal(plain, cast)


# -- the drawn positive -----------------------------------------------------------------------------------------------


def test_supcon_out_is_the_expectation_of_infonce():
    generator = torch.Generator().manual_seed(0)
    z = unit(torch.randn(10, 4, dtype=torch.float64, generator=generator))
    correct, group = torch.arange(10) % 5 < 4, torch.arange(10) // 5
    drawn = torch.stack(
        [contrastive_loss(z, correct, group, temperature=0.5, generator=generator).per_rollout for _ in range(4000)]
    )
    want = contrastive_loss(z, correct, group, temperature=0.5, loss="supcon_out").per_rollout
    error = drawn.std(dim=0) / math.sqrt(len(drawn))
    assert ((drawn.mean(dim=0) - want).abs() <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_draws_its_positive_with_its_own_number_however_the_batch_is_split(level):
    generator = torch.Generator().manual_seed(0)
    z = unit(torch.randn(24, 4, dtype=torch.float64, generator=generator))
    correct, group = torch.arange(24) % 8 < 5, torch.arange(24) // 8
    whole = contrastive_loss(z, correct, group, generator=torch.Generator().manual_seed(9)).per_rollout
    late = torch.Generator().manual_seed(9)
    torch.rand(8, dtype=torch.float64, generator=late)  # what the rank with the first group has drawn
    part = contrastive_loss(z[8:], correct[8:], group[8:], generator=late).per_rollout
    torch.testing.assert_close(part, whole[8:])


def test_the_global_generator_is_neither_read_nor_moved():
    z = unit(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))
    correct, group = torch.arange(12) % 6 < 5, torch.arange(12) // 6
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = contrastive_loss(z, correct, group).per_rollout
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(contrastive_loss(z, correct, group).per_rollout, first)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.ones(4)}, "`embeddings` must be a float32 or float64 tensor of shape"),
        (
            {"embeddings": torch.ones(4, 2, dtype=torch.float16)},
            r"`embeddings` must be .*got float16 of shape \(4, 2\)",
        ),
        ({"embeddings": torch.full((4, 2), math.nan)}, "`embeddings` must be finite, got NaN or infinity in 4 rows"),
        ({"embeddings": torch.tensor([[0.0, 1.0]] * 3 + [[math.inf, 0.0]])}, "first in row 3"),
        ({"correct": torch.ones(4)}, "`correct` must be a bool tensor"),
        ({"correct": torch.ones(3, dtype=torch.bool)}, r"`correct` must be .* \[N\] = \[4\], got bool of shape \(3,\)"),
        ({"correct": [True] * 4}, "`correct` must be a bool tensor"),
        ({"group": torch.zeros(5, dtype=torch.long)}, r"`group` must be .* got int64 of shape \(5,\)"),
        ({"group": torch.zeros(4)}, "`group` must be an integer tensor"),
        ({"loss": "triplet"}, "`loss` must be one of infonce, supcon_out, supcon_in, soft_nn, got 'triplet'"),
        ({"level": "all"}, "`level` must be one of group, batch, cross"),
        ({"similarity": "dot"}, "`similarity` must be one of cosine, l2"),
        ({"denominator": "positives"}, "`denominator` must be one of all, negatives"),
        ({"temperature": 0.0}, "`temperature` must be a finite number above 0, got 0.0"),
        ({"temperature": -1}, "`temperature` must be"),
        ({"temperature": math.nan}, "`temperature` must be"),
        ({"temperature": math.inf}, "`temperature` must be"),
        ({"temperature": "0.1"}, "`temperature` must be"),
    ],
)
def test_bad_input_is_named_with_what_would_be_right(change, message):
    arguments = {
        "embeddings": torch.ones(4, 2),
        "correct": torch.ones(4, dtype=torch.bool),
        "group": torch.zeros(4, dtype=torch.long),
    } | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)


def test_shapes_hold_when_jaxtyping_checks_them():
    checked = jaxtyped(typechecker=beartype)
    z, correct, group = unit(torch.randn(6, 3)), torch.arange(6) % 3 < 2, torch.arange(6) // 3
    for level in LEVELS:
        result = checked(contrastive_loss)(z, correct, group, level=level)
        assert checked(contrastive_reward)(result.per_rollout, result.valid).shape == (6,)
    assert checked(debias_states)(z, group, "group_mean").shape == (6, 3)
    assert checked(ContrastiveHead.forward)(ContrastiveHead(3, 4), z).shape == (6, 4)
    with pytest.raises(TypeCheckError):
        checked(contrastive.contrastive_loss)(z, correct[:-1], group)


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
