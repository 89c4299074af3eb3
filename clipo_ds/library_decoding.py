"""Decoding with transformers' own `generate`, for models that keep what they remember in a way of their own.

Layer L2, above `clipo_ds.generation`; imports torch, transformers and `clipo_ds.sampling`. Slower than the loop around
`clipo_ds.decoding`, and right wherever the library is: rows whose prompts are of one length are decoded together, so
that nothing is padded, and each of them to the end of the longest. The library makes the logits; tokens and their
log-probabilities are drawn here, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from clipo_ds.sampling import Row, Sampling, draw_next
from clipo_ds.types import Prompt


def decode_with_library(
    model: PreTrainedModel, prompts: Sequence[Prompt], rows: Sequence[Row], sampling: Sampling, *, max_sequences: int
) -> None:
    """Decode all rows to their end, at most `max_sequences` at once."""
    # What the model's folder says of sampling (penalties and the like) is merged into what `generate` is given.
    model.generation_config = GenerationConfig()
    config = GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=False, pad_token_id=0)
    lengths = {row.prompt: len(prompts[row.prompt].token_ids) for row in rows}
    for length in sorted(set(lengths.values())):
        alike = [row for row in rows if lengths[row.prompt] == length]
        for first in range(0, len(alike), max_sequences):
            batch = alike[first : first + max_sequences]
            ids = torch.tensor([prompts[row.prompt].token_ids for row in batch], device=model.device)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Draws(batch, sampling)]),
                stopping_criteria=StoppingCriteriaList([_Ended(batch, sampling)]),
            )


class _Draws(LogitsProcessor):
    """Draws the rows' next tokens, and leaves the library no other choice."""

    def __init__(self, rows: Sequence[Row], sampling: Sampling) -> None:
        self.rows, self.sampling = rows, sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        alive = [place for place, row in enumerate(self.rows) if not row.ended(self.sampling)]
        draw_next(scores[alive], [self.rows[place] for place in alive], self.sampling)
        chosen = torch.tensor([row.token_ids[-1:] for row in self.rows], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _Ended(StoppingCriteria):
    """Which rows have drawn their last token; the library stops when all have."""

    def __init__(self, rows: Sequence[Row], sampling: Sampling) -> None:
        self.rows, self.sampling = rows, sampling

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.tensor([row.ended(self.sampling) for row in self.rows], device=input_ids.device)
