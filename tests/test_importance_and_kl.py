"""What goes into the loss beside an objective's clipped ratios: truncated importance weights, and the KL divergence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_oracle import batch, loop_oracle

from clipo_ds.objectives import (
    AGGREGATIONS,
    KL_KINDS,
    OBJECTIVES,
    importance_weights,
    kl_estimate,
    loss_denominator,
    loss_sum,
    resolve_objective,
    token_losses,
)


def test_importance_weights_are_truncated_and_one_outside_of_the_mask():
    old = torch.tensor([[-1.0, -1.0, -1.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    weight = importance_weights(old, torch.tensor([[-3.0, -0.5, -1.0, 0.0]]), mask, cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([[2.0, math.exp(-0.5), 1.0, 1.0]]))
    assert not weight.requires_grad
    assert importance_weights(torch.zeros(1, 1), torch.full((1, 1), -900.0), mask[:, :1], cap=1e30).isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_importance_weights_multiply_the_loss_of_each_token(objective, aggregation):
    logprobs, old, advantages, mask = batch(6)
    spec = resolve_objective(objective, aggregation=aggregation, constant_length=6)
    weight = importance_weights(old, old + torch.linspace(-1, 1, 6, dtype=torch.float64), mask, cap=1.5)
    terms = token_losses(logprobs, old, advantages, mask, spec, weight=weight)
    have = loss_sum(terms.loss, mask, aggregation) / loss_denominator(mask, aggregation, 6)
    torch.testing.assert_close(have, loop_oracle(logprobs, old, advantages, mask, spec, weight))


def test_kl_estimators_have_their_values_and_slopes():
    # Log-ratio 1: k1 = 1, k2 = 1/2, k3 = 1/e; slopes 1, k1, 1 - exp(-k1).
    for kind, value, slope in (("k1", 1.0, 1.0), ("k2", 0.5, 1.0), ("k3", math.exp(-1), 1 - math.exp(-1))):
        leaf = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
        kl = kl_estimate(leaf, torch.tensor([[-2.0]], dtype=torch.float64), kind)
        kl.sum().backward()
        assert (kl.item(), leaf.grad.item()) == (pytest.approx(value), pytest.approx(slope))


@settings(max_examples=200, deadline=None)
@given(gap=st.floats(-30, 30) | st.floats(-1e-2, 1e-2), start=st.floats(-12, 0))
def test_k3_is_never_negative_and_keeps_its_digits_in_float32(gap, start):
    logprobs = torch.tensor([[start]], dtype=torch.float32)
    reference = logprobs + gap
    exact = (reference - logprobs).double()
    have = kl_estimate(logprobs, reference, "k3").double()
    assert have.item() >= 0
    torch.testing.assert_close(have, torch.expm1(exact) - exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_kl_of_policies_far_apart_stays_finite(kind):
    leaf = torch.tensor([[-800.0, 0.0]], requires_grad=True)
    kl = kl_estimate(leaf, torch.tensor([[0.0, -800.0]]), kind)
    kl.sum().backward()
    assert kl.isfinite().all() and leaf.grad.isfinite().all()


def test_k3_estimates_the_divergence_of_two_distributions():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.2, 0.3, 0.5]).double().log()
    divergence = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):  # unbiased: their mean under the policy is the divergence
        estimate = (policy.exp() * kl_estimate(policy[None], reference[None], kind)).sum()
        torch.testing.assert_close(estimate, divergence)
