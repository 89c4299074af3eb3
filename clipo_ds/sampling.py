"""From next-token logits to drawn tokens: temperature, top-k, top-p, and one uniform number a token.

Layer L2, above `clipo_ds.generation`; imports torch and numpy only. `Row` is a rollout on its way through whichever
loop decodes it. A draw is the inverse of the cumulative distribution at a given uniform number, so a rollout is a
function of the weights and of its own stream of uniforms: neither the rows that happen to share a batch, nor their
order, nor the number of ranks changes it (up to the rounding of the logits).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

BLOCK = 128  # tokens of the vocabulary that are summed to one number before the search
NUM_NUCLEUS_CANDIDATES = (256, 4096)  # tried before the whole vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """How one call of `generate` draws, and when its rollouts end."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_ids: Collection[int]
    completes_stop: Callable[[Sequence[int]], bool]  # whether the last token of a response ends a text that ends it


@dataclass
class Row:
    """One rollout on its way."""

    prompt: int  # position in the caller's list
    rollout: int
    stream: np.random.Generator
    start: int = 0  # column of the cache at which the prompt begins
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False  # ended by a stop token or text

    def ended(self, sampling: Sampling) -> bool:
        """Whether no token follows."""
        return self.stopped or len(self.token_ids) == sampling.max_new_tokens


def draw_next(logits: Tensor, rows: Sequence[Row], sampling: Sampling) -> None:
    """Draw the next token of each row from its logits Float[N, V], with the row's own next uniform number."""
    uniforms = torch.tensor([row.stream.random() for row in rows], dtype=torch.float64, device=logits.device)
    tokens, logprobs = draw_tokens(
        logits, uniforms, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
    )
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
        row.token_ids.append(token)
        row.logprobs.append(logprob)
        row.stopped = token in sampling.stop_ids or sampling.completes_stop(row.token_ids)


def uniform_stream(seed: int, uid: int, rollout: int) -> np.random.Generator:
    """The stream of uniforms of one rollout; independent of every other (seed, prompt, rollout).

    >>> bool(uniform_stream(0, 7, 1).random() == uniform_stream(0, 7, 1).random())
    True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, uid, rollout))))


def rollout_seed(seed: int, uid: int, rollout: int) -> int:
    """The same for a sampler that makes its own uniforms from one number: in [0, 2^63), one after the other in a group.

    >>> rollout_seed(0, 7, 1) == rollout_seed(0, 7, 0) + 1 != rollout_seed(0, 1, 1)
    True
    """
    first = np.random.SeedSequence((seed, uid)).generate_state(1, np.uint64)[0] >> np.uint64(2)
    return int(first) + rollout


def draw_tokens(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw one token a row and give its log-probability at temperature 1 without filters.

    The distribution drawn from is softmax(logits / temperature), restricted to the `top_k` likeliest tokens, then to
    the smallest set of likeliest tokens that holds a probability of `top_p`, and renormalised. With its cumulative
    distribution F over token ids, token v is drawn when F(v - 1) <= u < F(v).

    Args:
        logits: Float[N, V], below +inf.
        uniforms: Float64[N] in [0, 1); not used at temperature 0.
        temperature: 0 takes the likeliest token (the lowest id among equals).
        top_p: Nucleus threshold in (0, 1]; 1 is off.
        top_k: Number of likeliest tokens to keep; 0 is off. Tokens as likely as the last one kept stay too.

    Returns:
        Tokens Int[N] and their natural-log probabilities Float64[N] under softmax(logits).

    Raises:
        FloatingPointError: A row is not a distribution: NaN, +inf, or -inf everywhere.
    """
    logits = logits.float()
    probabilities = logits.softmax(-1)  # (N, V)
    largest = probabilities.amax(-1, keepdim=True)
    if bool(largest.isnan().any()):
        raise FloatingPointError("the sampler's logits are not finite: the weights that it was given are broken")
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        weights = probabilities if temperature == 1 else (logits / temperature).softmax(-1)
        if 0 < top_k < logits.shape[-1]:
            weights = _keep_top_k(weights, top_k)
        if top_p < 1:
            weights = _keep_nucleus(weights, top_p)
        tokens = _invert(weights, uniforms)
    # log p = (logit - largest logit) + log(largest probability): exact where p itself would underflow. The float32
    # softmax over a large vocabulary is off by some 1e-5, equally for all tokens: its sum in float64 takes that out.
    gap = logits.gather(-1, tokens[:, None]) - logits.amax(-1, keepdim=True)
    total = _block_sums(probabilities).sum(-1, keepdim=True)
    return tokens, (gap.double() + (largest.double() / total).log()).squeeze(-1)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """First token whose cumulative weight exceeds u times the whole; it always has a positive weight.

    Two levels, block then token, because a float64 running sum over a whole vocabulary costs more than a small model's
    step.
    """
    blocks = _blocks(weights)
    running = _block_sums(weights).cumsum(-1)  # (N, B)
    target = _below(uniforms[:, None] * running[:, -1:], running[:, -1:])
    block = torch.searchsorted(running, target, right=True)  # (N, 1)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.take_along_dim(block[..., None], 1).squeeze(1).double().cumsum(-1)  # (N, BLOCK)
    # The running sum inside a block and the block's own sum are rounded differently.
    rest = _below(target - before, inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(-1)


def _blocks(weights: Tensor) -> Tensor:
    """The vocabulary cut into blocks, filled up with zeros where it does not divide: (N, V) -> (N, B, BLOCK)."""
    short = -weights.shape[-1] % BLOCK
    return (torch.nn.functional.pad(weights, (0, short)) if short else weights).unflatten(-1, (-1, BLOCK))


def _block_sums(weights: Tensor) -> Tensor:
    return _blocks(weights).sum(-1).double()  # (N, B)


def _below(value: Tensor, limit: Tensor) -> Tensor:
    """The value, or the largest float below `limit` where it is not below it."""
    return torch.minimum(value, torch.nextafter(limit, torch.zeros_like(limit)))


def _keep_top_k(weights: Tensor, top_k: int) -> Tensor:
    last_kept = weights.topk(top_k, dim=-1).values[:, -1:]
    return weights.masked_fill(weights < last_kept, 0.0)


def _keep_nucleus(weights: Tensor, top_p: float) -> Tensor:
    target = top_p * _block_sums(weights).sum(-1, keepdim=True)
    size = weights.shape[-1]
    # A nucleus is nearly always small, and sorting the whole vocabulary is slow.
    for count in (*(c for c in NUM_NUCLEUS_CANDIDATES if c < size), size):
        likeliest, ids = weights.topk(count, dim=-1)
        running = likeliest.double().cumsum(-1)
        if bool((running[:, -1:] >= target).all()):
            break
    outside = running - likeliest.double() >= target  # the likelier ones hold top_p already
    return torch.zeros_like(weights).scatter_(-1, ids, likeliest.masked_fill(outside, 0.0))
