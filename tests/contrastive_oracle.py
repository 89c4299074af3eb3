"""The contrastive losses written down a second time, anchor by anchor, and batches to compare them on."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@st.composite
def batches(draw):
    n, dim = draw(st.integers(0, 14)), draw(st.integers(1, 5))
    labels = draw(st.lists(st.sampled_from([-(2**62), -7, 0, 3, 2**62]), min_size=n, max_size=n))
    correct = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    z = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    return unit(z), torch.tensor(correct, dtype=torch.bool), torch.tensor(labels, dtype=torch.long)


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
