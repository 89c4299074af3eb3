"""Policy objectives against loops over tokens, hand-worked values and the golden vectors.

The largest errors against ../shared/golden are shown by
`pytest tests/test_objectives.py -k golden --log-cli-level=INFO`, and are properties of the JUnit report.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped
from objective_oracle import batch, loop_oracle

from clipo_ds.objectives import (
    AGGREGATIONS,
    KL_KINDS,
    OBJECTIVES,
    importance_weights,
    kl_estimate,
    loss_denominator,
    loss_sum,
    policy_loss,
    resolve_objective,
    token_losses,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "objectives.npz"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
logger = logging.getLogger(__name__)


# -- golden vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/golden")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_losses_gradients_and_kl_equal_the_golden_vectors(dtype, tolerance, record_property):
    arrays = np.load(GOLDEN)
    worst: dict[str, float] = {}
    for case in json.loads(str(arrays["index"])):
        values = {
            name: torch.from_numpy(np.asarray(arrays[f"{case['case']}_{name}"]))
            for name in ("logprobs", "old_logprobs", "ref_logprobs", "mask", "advantages", "loss", "grad", *KL_KINDS)
        }
        leaf = values["logprobs"].to(dtype).requires_grad_()
        old, ref = values["old_logprobs"].to(dtype), values["ref_logprobs"].to(dtype)
        words = ("objective", "aggregation", "clip_low", "clip_high", "dual_clip", "constant_length")
        loss = policy_loss(
            leaf, old, values["advantages"].to(dtype), values["mask"], **{word: case[word] for word in words}
        )
        loss.backward()
        assert loss.dtype == leaf.grad.dtype == dtype
        errors = {"loss": loss.detach() - values["loss"], "gradient": leaf.grad - values["grad"]}
        for kind in KL_KINDS:
            errors[kind] = kl_estimate(leaf.detach(), ref, kind) - values[kind]
        for name, difference in errors.items():
            error = float(difference.abs().max())
            assert error < tolerance, f"{name} is off by {error:.2e} in {case}"
            worst[name] = max(worst.get(name, 0.0), error)
    for name, error in worst.items():
        record_property(f"largest_error_{name}_{dtype}", error)
        logger.info("golden objectives, %s: largest error of the %s %.1e", dtype, name, error)


# -- the loop oracle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dual_clip", [None, 1.1])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), t=st.integers(1, 7), spread=st.sampled_from([1e-3, 0.3, 2.0]))
def test_values_and_gradients_equal_a_loop_over_tokens(objective, aggregation, dual_clip, seed, n, t, spread):
    spec = resolve_objective(objective, aggregation=aggregation, dual_clip=dual_clip)
    leaf, old, advantages, mask = batch(seed, n, t, spread)
    leaf.requires_grad_()
    want = loop_oracle(leaf, old, advantages, mask, spec)
    (slope,) = torch.autograd.grad(want + 0 * leaf.sum(), leaf)
    for dtype, tolerance in TOLERANCE.items():
        ours = leaf.detach().to(dtype).requires_grad_()
        have = policy_loss(
            ours,
            old.to(dtype),
            advantages.to(dtype),
            mask,
            objective=objective,
            aggregation=aggregation,
            dual_clip=dual_clip,
        )
        have.backward()
        assert have.dtype == dtype
        torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)
        if dtype == torch.float64:  # rounding may put a float32 ratio on the other side of a clip
            torch.testing.assert_close(ours.grad, slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_of_parts_over_the_global_denominator_is_the_loss_of_the_whole(objective, aggregation):
    logprobs, old, advantages, mask = batch(3, n=8)
    spec = resolve_objective(objective, aggregation=aggregation, constant_length=6, dual_clip=2.0)
    whole = logprobs.clone().requires_grad_()
    words = {"objective": objective, "aggregation": aggregation, "constant_length": 6, "dual_clip": 2.0}
    want = policy_loss(whole, old, advantages, mask, **words)
    want.backward()
    denominator = sum(loss_denominator(mask[rows], aggregation, 6) for rows in (slice(0, 3), slice(3, 8)))
    parts = logprobs.clone().requires_grad_()
    total = 0.0
    for rows in (slice(0, 1), slice(1, 5), slice(5, 7), slice(7, 8)):
        width = max(int(mask[rows].any(dim=0).nonzero().max()) + 1 if mask[rows].any() else 1, 1)  # its own padding
        cut = (rows, slice(0, width))
        loss = loss_sum(
            token_losses(parts[cut], old[cut], advantages[rows], mask[cut], spec).loss, mask[cut], aggregation
        )
        (loss / denominator).backward()
        total += float(loss.detach() / denominator)
    assert total == pytest.approx(want.item())
    torch.testing.assert_close(parts.grad, whole.grad)


# -- hand-worked values -----------------------------------------------------------------------------------------------


def one_token(ratio, advantage, **words):
    leaf = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = policy_loss(leaf, torch.zeros_like(leaf), torch.tensor([advantage], dtype=torch.float64), mask, **words)
    loss.backward()
    return loss.item(), leaf.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "words", "loss", "slope"),
    [
        (1.1, 2.0, {}, -2.2, -2.2),  # inside: -r A, and d r / d logprob = r
        (1.5, 2.0, {}, -2.4, 0.0),  # too high for a good token: -1.2 A, no gradient
        (0.5, 2.0, {}, -1.0, -1.0),  # too low for a good token: the minimum keeps r
        (0.5, -2.0, {}, 1.6, 0.0),  # too low for a bad token: 0.8 · 2
        (5.0, -2.0, {}, 10.0, 10.0),  # too high for a bad token: unbounded …
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),  # … without dual clip
        (1.25, 2.0, {"objective": "dapo"}, -2.5, -2.5),  # 1.25 < 1.28
        (1.25, 2.0, {"objective": "dapo", "clip_high": 0.2}, -2.4, 0.0),
        (1.001, 2.0, {"objective": "gspo"}, -2.0008, 0.0),
        (math.e, 2.0, {"objective": "gmpo"}, -2 * math.exp(0.4), 0.0),
        (1 / math.e, -2.0, {"objective": "gmpo"}, 2 * math.exp(-0.4), 0.0),
        (math.e, -2.0, {"objective": "gmpo"}, 2 * math.e, 2 * math.e),
        (1.1, 2.0, {"objective": "dr_grpo", "constant_length": 4}, -0.55, -0.55),
    ],
)
def test_one_token_is_clipped_as_the_paper_says(ratio, advantage, words, loss, slope):
    assert one_token(ratio, advantage, **words) == (pytest.approx(loss), pytest.approx(slope))


def test_aggregations_weigh_short_and_long_responses_differently():
    # Ratio 1: each token's loss is -A. Row 0 has 1 token and A = 1, row 1 has 3 tokens and A = 3.
    logprobs, mask = torch.zeros(2, 4), torch.tensor([[True, False, False, False], [True, True, True, False]])
    advantages = torch.tensor([1.0, 3.0])

    def loss(aggregation, length=None):
        return policy_loss(logprobs, logprobs, advantages, mask, aggregation=aggregation, constant_length=length).item()

    assert loss("sequence_mean") == pytest.approx(-(1 + 3) / 2)
    assert loss("token_mean") == pytest.approx(-(1 + 9) / 4)
    assert loss("constant", 5) == pytest.approx(-(1 + 9) / 10)
    assert loss("constant") == pytest.approx(-(1 + 9) / 8)  # the width of the batch


def test_an_empty_response_counts_in_the_sequence_mean_and_adds_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    loss = policy_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([1.0, 5.0]), mask)
    assert loss.item() == pytest.approx(-0.5)


def test_published_defaults_are_those_of_the_papers():
    table = {
        "grpo": (0.2, 0.2, "sequence_mean", "std", False, 0.0),
        "dr_grpo": (0.2, 0.2, "constant", "none", False, 0.0),
        "dapo": (0.2, 0.28, "token_mean", "std", True, 0.2),
        "gspo": (3e-4, 4e-4, "sequence_mean", "std", False, 0.0),
        "gmpo": (0.4, 0.4, "sequence_mean", "std", False, 0.0),
    }
    for name, want in table.items():
        spec = resolve_objective(name)
        fields = (
            "clip_low",
            "clip_high",
            "aggregation",
            "advantage_normalize",
            "dynamic_sampling",
            "overlong_fraction",
        )
        assert tuple(getattr(spec, field) for field in fields) == want
        assert spec.dual_clip is None and spec.constant_length is None
    changed = resolve_objective("dapo", dynamic_sampling=False, advantage_normalize="none", clip_low=0.1)
    assert changed == replace(
        resolve_objective("dapo"), dynamic_sampling=False, advantage_normalize="none", clip_low=0.1
    )


# -- corners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_gives_a_zero_gradient_where_the_mask_is_empty(objective, shape, dtype):
    leaf = torch.zeros(shape, dtype=dtype, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    loss = policy_loss(leaf, torch.zeros_like(leaf), torch.ones(shape[0], dtype=dtype), mask, objective=objective)
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype == dtype
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_stands_outside_of_the_mask_reaches_neither_loss_nor_gradient(objective, garbage):
    logprobs, old, advantages, mask = batch(1)
    results = []
    for filler in (0.0, garbage):
        leaf = torch.where(mask, logprobs, filler).requires_grad_()
        loss = policy_loss(leaf, torch.where(mask, old, -filler), advantages, mask, objective=objective)
        loss.backward()
        results.append((loss.item(), leaf.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1][~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gap", [-500.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_stay_finite(objective, gap, dtype):
    leaf = torch.full((2, 3), gap, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss = policy_loss(leaf, torch.zeros_like(leaf), torch.tensor([1.0, -1.0], dtype=dtype), mask, objective=objective)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_gradient_flows_into_the_old_policy_or_the_advantages(objective):
    logprobs, old, advantages, mask = batch(1)
    for tensor in (logprobs, old, advantages):
        tensor.requires_grad_()
    policy_loss(logprobs, old, advantages, mask, objective=objective).backward()
    assert logprobs.grad is not None and old.grad is None and advantages.grad is None


def test_the_first_update_gives_the_policy_gradient_even_when_both_policies_are_one_tensor():
    logprobs, _, advantages, mask = batch(1)
    logprobs.requires_grad_()
    policy_loss(logprobs, logprobs, advantages, mask, aggregation="token_mean").backward()
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -advantages[:, None] / mask.sum(), 0.0))


def test_clip_flags_say_which_clip_cuts_the_gradient():
    spec = resolve_objective("grpo", dual_clip=3.0)
    ratios = torch.tensor([[0.5, 1.0, 1.5, 4.0]]).repeat(3, 1)
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False]])
    leaf = ratios.log().requires_grad_()
    terms = token_losses(leaf, torch.zeros(3, 4), torch.tensor([1.0, -1.0, 1.0]), mask, spec)
    assert terms.clipped_high.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert terms.clipped_low.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    loss_sum(terms.loss, mask, "token_mean").backward()
    assert torch.equal(leaf.grad == 0, terms.clipped_low | terms.clipped_high | ~mask)


@pytest.mark.parametrize("objective", ["gspo", "gmpo"])
def test_sequence_objectives_give_every_token_of_a_sequence_its_loss(objective):
    logprobs, old, advantages, mask = batch(4)
    terms = token_losses(logprobs, old, advantages, mask, resolve_objective(objective))
    for i in range(len(mask) - 1):
        assert len(set(terms.loss[i][mask[i]].tolist())) == 1
        assert torch.equal(terms.loss[i][~mask[i]], torch.zeros(int((~mask[i]).sum()), dtype=torch.float64))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "ppo"}, "`objective` must be one of grpo, dr_grpo, dapo, gspo, gmpo, got 'ppo'"),
        ({"aggregation": "mean"}, "`aggregation` must be one of sequence_mean, token_mean, constant"),
        ({"clip_low": 0.0}, "`clip_low` must be a finite number above 0"),
        ({"clip_high": -0.1}, "`clip_high` must be a finite number above 0"),
        ({"dual_clip": 1.0}, "`dual_clip` must be None or above 1, got 1.0"),
        ({"constant_length": 0}, "`constant_length` must be None or a whole number of at least 1 token, got 0"),
        ({"constant_length": 2.5}, "`constant_length` must be .*, got 2.5"),
        ({"clip_low": math.nan}, "`clip_low` must be a finite number above 0, got nan"),
        ({"logprobs": torch.zeros(2, 3).half()}, "`logprobs` must be a float32 or float64 tensor"),
        ({"old_logprobs": torch.zeros(2, 4)}, r"`old_logprobs` must be .* \[N, T\] = \[2, 3\], got float32 of shape"),
        ({"advantages": torch.zeros(2, 3)}, r"`advantages` must be .* \[N\] = \[2\]"),
        ({"advantages": torch.tensor([0.0, math.nan])}, "`advantages` must be finite, .*first in row 1"),
        ({"mask": torch.ones(2, 3)}, "`mask` must be a bool tensor"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, r"`mask` must be .* \[N, T\] = \[2, 3\]"),
        ({"logprobs": torch.full((2, 3), math.nan)}, "`logprobs` must be finite"),
        ({"old_logprobs": torch.full((2, 3), -math.inf)}, "`old_logprobs` must be finite"),
    ],
)
def test_bad_input_is_named_with_what_would_be_right(change, message):
    arguments = {
        "logprobs": torch.zeros(2, 3),
        "old_logprobs": torch.zeros(2, 3),
        "advantages": torch.ones(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    } | change
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments)


def test_the_other_functions_name_bad_input_too():
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="`kind` must be one of k1, k2, k3, got 'k4'"):
        kl_estimate(zeros, zeros, "k4")
    with pytest.raises(ValueError, match="`ref_logprobs` must be"):
        kl_estimate(zeros, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`cap` must be a finite number above 0"):
        importance_weights(zeros, zeros, mask, cap=0)
    with pytest.raises(ValueError, match="`constant_length` must be at least 1 token for the constant aggregation"):
        loss_denominator(mask, "constant")
    with pytest.raises(ValueError, match="`token_loss` must be"):
        loss_sum(zeros[:1], mask, "token_mean")
    with pytest.raises(ValueError, match="`weight` must be"):
        token_losses(zeros, zeros, torch.ones(2), mask, resolve_objective("grpo"), weight=torch.ones(2))
    with pytest.raises(ValueError, match="`advantage_normalize` must be one of std, none"):
        resolve_objective("grpo", advantage_normalize="max")


def test_shapes_hold_when_jaxtyping_checks_them():
    checked = jaxtyped(typechecker=beartype)
    logprobs, old, advantages, mask = batch(0)
    for objective in OBJECTIVES:
        assert checked(policy_loss)(logprobs, old, advantages, mask, objective=objective).shape == ()
        terms = checked(token_losses)(logprobs, old, advantages, mask, resolve_objective(objective))
        assert terms.loss.shape == terms.clipped_low.shape == terms.clipped_high.shape == mask.shape
    for aggregation in AGGREGATIONS:
        assert checked(loss_sum)(terms.loss, mask, aggregation).shape == ()
        assert checked(loss_denominator)(mask, aggregation, 3).shape == ()
    assert checked(kl_estimate)(logprobs, old).shape == checked(importance_weights)(logprobs, old, mask).shape
    with pytest.raises(TypeCheckError):
        checked(policy_loss)(logprobs, old[:, 1:], advantages, mask)
