"""Contrastive losses against a loop oracle, hand-worked values and the golden vectors.

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
from contrastive_oracle import batches, oracle_with_gradient, unit
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
    contrastive_loss,
    contrastive_reward,
    debias_states,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "contrastive.npz"
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
logger = logging.getLogger(__name__)


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
