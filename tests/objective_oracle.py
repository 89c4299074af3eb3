"""The policy objectives written down a second time, token by token, and batches to compare them on."""

from __future__ import annotations

import torch


def batch(seed, n=5, t=6, spread=0.5, dtype=torch.float64):
    """Log-probabilities, old ones, advantages of both signs and zero, and a mask with a hole and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(n, t, generator=generator, dtype=torch.float64) * 3
    old = logprobs + spread * torch.randn(n, t, generator=generator, dtype=torch.float64)
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    advantages[0] = 0.0
    mask = torch.rand(n, t, generator=generator) < 0.7
    mask[-1] = False
    return logprobs.to(dtype), old.to(dtype), advantages.to(dtype), mask


def loop_oracle(logprobs, old, advantages, mask, spec, weight=None):
    """One token at a time, with Python's arithmetic on scalars of the graph."""
    total, count = logprobs.new_zeros(()), 0
    for i in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[i, t]]
        a, losses = float(advantages[i]), []
        deltas = [logprobs[i, t] - old[i, t] for t in tokens]
        if spec.name == "gmpo" and tokens:
            kept = [d.clamp(max=spec.clip_high) if a > 0 else d.clamp(min=-spec.clip_low) for d in deltas]
            losses = [-a * torch.exp(sum(kept) / len(kept))] * len(tokens)
        elif tokens:
            if spec.name == "gspo":
                deltas = [sum(deltas) / len(deltas)] * len(deltas)
            for ratio in (torch.exp(d.clamp(-20, 20)) for d in deltas):
                outside = (a > 0 and ratio > 1 + spec.clip_high) or (a < 0 and ratio < 1 - spec.clip_low)
                losses.append(-a * (ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high).detach() if outside else ratio))
        if spec.dual_clip is not None and a < 0:
            losses = [loss.clamp(max=-spec.dual_clip * a) for loss in losses]
        if weight is not None:
            losses = [loss * weight[i, t] for loss, t in zip(losses, tokens, strict=True)]
        length = len(tokens) if spec.aggregation == "sequence_mean" else 1
        total = total + sum(losses) / max(length, 1)
        count += len(tokens)
    return (
        total
        / {
            "sequence_mean": len(mask),
            "token_mean": max(count, 1),
            "constant": len(mask) * (spec.constant_length or mask.shape[1]),
        }[spec.aggregation]
    )
