"""Inverse-CDF drawing against a loop oracle, at its edges and in distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clipo_ds.sampling import draw_tokens, uniform_stream

LARGEST_UNIFORM = 1 - 2**-53


def oracle(logits: list[float], u: float, temperature: float, top_p: float, top_k: int) -> int:
    """One token, drawn as the docstring says, in plain Python."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    kept = set(range(len(logits)))
    if top_k:
        last = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
        kept = {v for v in kept if weights[v] >= last}
    if top_p < 1:
        total, before, nucleus = sum(weights[v] for v in kept), 0.0, set()
        for v in sorted(kept, key=lambda v: -weights[v]):
            if before < top_p * total:
                nucleus.add(v)
            before += weights[v]
        kept = nucleus
    target, running = u * sum(weights[v] for v in sorted(kept)), 0.0
    for v in sorted(kept):
        running += weights[v]
        if running > target:
            return v
    return max(kept)


@settings(deadline=None)
@given(
    size=st.sampled_from([1, 2, 7, 127, 128, 129, 700]),
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 50]),
)
def test_draws_agree_with_a_loop(size: int, seed: int, temperature: float, top_p: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, size, generator=generator)
    uniforms = torch.rand(4, generator=generator, dtype=torch.float64)
    drawn, logprobs = draw_tokens(logits, uniforms, temperature=temperature, top_p=top_p, top_k=top_k)
    for token, row, u in zip(drawn.tolist(), logits.tolist(), uniforms.tolist(), strict=True):
        # Within float32's rounding of a boundary, of the draw or of the nucleus, either side is right.
        assert token in {
            oracle(row, min(max(u + du, 0.0), 1.0), temperature, top_p if top_p == 1 else top_p + dp, top_k)
            for du in (-1e-5, 0.0, 1e-5)
            for dp in (-1e-5, 0.0, 1e-5)
        }
    full = logits.double().log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1)
    assert torch.allclose(logprobs, full, atol=1e-6, rtol=0)


def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token() -> None:
    # Only tokens 130 and 140 of 300 are possible: nothing before, between or after them may be drawn.
    logits = torch.full((3, 300), -torch.inf)
    logits[:, 130] = logits[:, 140] = 0.0
    uniforms = torch.tensor([0.0, 0.5, LARGEST_UNIFORM], dtype=torch.float64)
    drawn, logprobs = draw_tokens(logits, uniforms)
    assert drawn.tolist() == [130, 140, 140]
    assert logprobs.tolist() == pytest.approx([-math.log(2)] * 3)


def test_the_largest_uniform_draws_the_last_possible_token_whatever_the_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator)
    logits[:, 900:] = -torch.inf
    uniforms = torch.full((64,), LARGEST_UNIFORM, dtype=torch.float64)
    assert draw_tokens(logits, uniforms)[0].tolist() == [899] * 64


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0]])
    drawn, logprobs = draw_tokens(logits, torch.zeros(2, dtype=torch.float64), temperature=0.0)
    assert drawn.tolist() == [1, 0]
    # log softmax: 2 - log(1 + e^2 + e) and 3 - log(2 e^3 + e)
    assert logprobs.tolist() == pytest.approx(
        [2 - math.log(1 + math.e**2 + math.e), 3 - math.log(2 * math.e**3 + math.e)]
    )


def test_logprobs_of_tokens_that_only_a_high_temperature_draws_do_not_underflow() -> None:
    logits = torch.tensor([[0.0, -200.0]])
    drawn, logprobs = draw_tokens(logits, torch.tensor([0.9999], dtype=torch.float64), temperature=100.0)
    # at temperature 100 the second token has 12% and the largest uniforms draw it
    assert drawn.tolist() == [1] and logprobs.tolist() == pytest.approx([-200.0])


def test_top_k_keeps_equals_of_the_last_one() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(100, 1)
    uniforms = torch.arange(100, dtype=torch.float64) / 100
    assert set(draw_tokens(logits, uniforms, top_k=2)[0].tolist()) == {0, 1, 2}


def test_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(100, 1)
    uniforms = torch.arange(100, dtype=torch.float64) / 100
    for top_p, size in ((0.4, 1), (0.79, 2), (0.81, 3), (0.96, 4)):
        assert set(draw_tokens(logits, uniforms, top_p=top_p)[0].tolist()) == set(range(size))


def test_a_flat_nucleus_larger_than_the_candidates_is_found() -> None:
    # 6,000 equal tokens: half of them make the nucleus, more than the first two tries look at.
    uniforms = torch.linspace(0, 0.9999, 2000, dtype=torch.float64)
    drawn = draw_tokens(torch.zeros(2000, 6000), uniforms, top_p=0.5)[0]
    assert 1900 < len(set(drawn.tolist())) <= 2000


def test_frequencies_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]).repeat(20_000, 1)
    uniforms = torch.tensor(np.random.default_rng(0).random(20_000))
    drawn = draw_tokens(logits, uniforms, temperature=0.7, top_k=3)[0]
    weights = torch.tensor([2.0, 1.0, 0.0]).div(0.7).softmax(0).double()
    expected = (weights / weights.sum() * 20_000).numpy()
    assert stats.chisquare(np.bincount(drawn.numpy(), minlength=3), expected).pvalue > 0.001


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_distribution_are_refused(bad: float) -> None:
    logits = torch.full((2, 4), bad)
    logits[0] = 0.0
    with pytest.raises(FloatingPointError, match="not finite"):
        draw_tokens(logits, torch.zeros(2, dtype=torch.float64))


def test_streams_differ_in_seed_prompt_and_rollout() -> None:
    first = {key: uniform_stream(*key).random() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(set(first.values())) == 4
