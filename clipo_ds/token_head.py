"""From hidden states to log-probabilities of given tokens, over chunks, so that [N, T, V] is never held.

Layer L2: imports torch and transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # as transformers' families name it


@dataclass(frozen=True)
class LogitShaping:
    """What a model does to its logits between output head and softmax: scales them, then caps them softly.

    A model without a bias in its head that scales the hidden states before it does the same.
    """

    scale: float = 1.0
    cap: float | None = None  # logits -> cap * tanh(logits / cap)
    vocab_size: int | None = None  # rows of the head after these are padding, and no tokens

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits[..., : self.vocab_size]
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def logit_shaping(config: PreTrainedConfig) -> LogitShaping:
    """How a model of transformers shapes its logits."""
    config = config.get_text_config(decoder=True)
    caps = (getattr(config, name, None) for name in CAPS)
    return LogitShaping(
        _scale(config), next((cap for cap in caps if cap), None), getattr(config, "unpadded_vocab_size", None)
    )


def _scale(config: PreTrainedConfig) -> float:
    family = config.model_type
    if family.startswith(("granite", "minicpm3")):
        return 1.0 / config.logits_scaling
    if family == "inkling_text":
        return 1.0 / config.logits_mup_width_multiplier
    if family.startswith("hyperclovax"):
        return float(config.logits_scaling)
    if family.startswith("cohere"):
        return float(config.logit_scale)
    return float(config.lm_head_multiplier) if family == "falcon_h1" else 1.0


class TokenHead(nn.Module):
    """Log-probabilities and entropies of given tokens from hidden states, over chunks of tokens.

    It holds the output weight itself (the same parameter object as the model's own head), so that ZeRO-3 gathers it for
    this module's forward and backward as a whole. Where there are several, chunks are recomputed in the backward pass.
    """

    def __init__(self, output: nn.Linear, chunk_tokens: int, shaping: LogitShaping) -> None:
        super().__init__()
        self.weight = output.weight
        self.bias = output.bias
        self.chunk_tokens = chunk_tokens
        self.shaping = shaping

    def forward(self, states: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
        """Give ``(logprobs, entropies)``, each Float[M] in float32, for ``states`` [M, H] and ``targets`` Int[M]."""
        # One chunk's logits are in memory either way: a single chunk keeps its own for the backward pass.
        recompute = torch.is_grad_enabled() and len(states) > self.chunk_tokens
        pieces = [
            checkpoint(self._chunk, s, t, with_entropy, use_reentrant=False)
            if recompute
            else self._chunk(s, t, with_entropy)
            for s, t in zip(states.split(self.chunk_tokens), targets.split(self.chunk_tokens), strict=True)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(self, states: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
        logits = self.shaping(functional.linear(states, self.weight, self.bias).float())
        if not with_entropy:
            logprobs = -functional.cross_entropy(logits, targets, reduction="none")
            return logprobs, torch.zeros_like(logprobs)
        log = logits.log_softmax(-1)
        del logits  # two tensors of [M, V] at a time, not three
        logprobs = log.gather(-1, targets[:, None]).squeeze(-1)  # a recomputation in the backward pass ends here
        return logprobs, -torch.linalg.vecdot(log.detach().exp(), log.detach())
