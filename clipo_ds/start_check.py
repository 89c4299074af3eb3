"""A short batch before the first step: what is trained is the model that transformers runs, and without noise.

Layer L2: imports torch and the package's engines. The trainer takes a model apart (decoder, output head, what shapes
the logits) to spare the memory of all logits; whether the parts make the whole again is asked of the weights
themselves, since code that came with a model can do anything in between.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from clipo_ds.batching import collate
from clipo_ds.policy import Policy
from clipo_ds.schema import ModelConfig
from clipo_ds.types import Batch, InputError, Prompt, Rollout

NUM_IDS = 1000  # tokens are drawn below this: plain text in every vocabulary
LENGTH = 12  # tokens of a response


def check_policy(policy: Policy, model: ModelConfig) -> None:
    """Score a short random batch in every way there is; called by all ranks, which all see the same.

    Raises:
        InputError: The model's own logits say something else, a token's probability depends on what comes after it, or
            training passes draw random numbers although `model.dropout` is none.
    """
    half = model.dtype == "bfloat16"
    batch = _batch(policy)
    try:
        scored = policy.score(batch).logprobs
        own = policy.score_from_logits(batch)
    except (AttributeError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError | torch.distributed.DistError):
            raise
        what = " ".join(str(error).split())[:200]
        raise InputError(
            f"`model.path` must be a causal language model whose decoder and output head can be told apart, got "
            f"{model.path!r}, whose first pass ended in {type(error).__name__}: {what}"
        ) from error
    off = _difference(scored, own, half)
    if off is not None:
        raise InputError(
            f"`model.path` must be a model whose logits are its output head's, scaled or capped as the trainer knows "
            f"(clipo_ds/token_head.py), got {model.path!r}, whose own log-probabilities differ by {off:.2g}"
        )
    # The first two rollouts differ in their last two tokens alone.
    off = _difference(own[0, : LENGTH - 2], own[1, : LENGTH - 2], half)
    if off is not None:
        raise InputError(
            f"`model.path` must be a causal language model, got {model.path!r}, whose log-probabilities change by "
            f"{off:.2g} with the tokens that come after"
        )
    if policy.draws_noise:
        return
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # checkpointing, without gradients
        trained = policy.forward(batch).logprobs
    off = _difference(scored, trained, half)
    if off is not None:
        raise InputError(
            f"`model.dropout` must be keep for a model whose noise cannot be switched off, got none for "
            f"{model.path!r}, whose log-probabilities change by {off:.2g} in training"
        )


def _difference(one: Tensor, other: Tensor, half: bool) -> float | None:
    """By how much two passes differ, where that is more than rounding; None where it is not, or where both are broken.

    What bfloat16 rounds away is a few hundredths in the mean; another model is off by more, and so is noise.
    """
    gap = (one - other).abs()
    size = float(gap.mean() if half else gap.max())
    return size if size > (0.05 if half else 1e-3) else None


def _batch(policy: Policy) -> Batch:
    """Three rollouts of one prompt: two alike but for the last two tokens, and a shorter one."""
    generator = torch.Generator().manual_seed(0)
    size = min(NUM_IDS, int(policy.model.config.get_text_config(decoder=True).vocab_size))
    ids = torch.randint(0, size, (4 + LENGTH,), generator=generator).tolist()
    prompt = Prompt(0, "", tuple(ids[:4]), "", "")
    changed = [(token + 1) % size for token in ids[-2:]]
    flat = [
        (prompt, Rollout(tuple(response), (0.0,) * len(response), "", False))
        for response in (ids[4:], [*ids[4:-2], *changed], ids[4 : 4 + LENGTH // 2])
    ]
    return collate(flat, [[0], [1], [2]], 0)
