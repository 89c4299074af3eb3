"""What a step writes of its rollouts: a row each in the run folder's parquet. Layer L3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipo_ds.contrastive_term import ContrastiveOutcome
from clipo_ds.experience import Experience


def rollout_columns(
    experience: Experience,
    outcome: ContrastiveOutcome | None,
    total_reward: Tensor,
    advantages: Tensor,
    *,
    reward_names: Sequence[str],
    step: int,
    with_embeddings: bool,
) -> dict[str, Any]:
    """This rank's rows, by column; `reward/NAME` is not weighted, as the metric of that name."""
    judgements, flat = experience.judgements, experience.flat
    columns: dict[str, Any] = {
        "step": [step] * len(flat),
        "group": experience.group.tolist(),
        "prompt": [prompt.text for prompt, _ in flat],
        "response": [rollout.text for _, rollout in flat],
        "ground_truth": [prompt.ground_truth for prompt, _ in flat],
        "source": [prompt.source for prompt, _ in flat],
        "prompt_uid": [prompt.uid for prompt, _ in flat],
        "extracted": [j.extracted for j in judgements],
        "correct": experience.correct.tolist(),
        "status": [j.status for j in judgements],
        "process_consistent": [j.process_consistent for j in judgements],
        "outcome_reward": [j.outcome for j in judgements],
        "reward": total_reward.tolist(),
        "contrastive_loss": [None] * len(flat),
        "contrastive_reward": [None] * len(flat),
        "advantage": advantages.tolist(),
        "num_tokens": experience.mask.sum(1).tolist(),
        "truncated": [rollout.truncated for _, rollout in flat],
        "dropped": experience.dropped.tolist(),
    }
    columns |= {f"reward/{name}": [j.value(name) for j in judgements] for name in reward_names}
    if outcome is not None:
        losses = zip(outcome.loss.tolist(), outcome.valid.tolist(), strict=True)
        columns["contrastive_loss"] = [loss if valid else None for loss, valid in losses]
        columns["contrastive_reward"] = outcome.reward.tolist()
    if with_embeddings:
        vectors = torch.nn.functional.normalize(experience.pooled, dim=1) if outcome is None else outcome.embeddings
        columns["embedding"] = vectors.to(torch.float16).cpu().numpy()
    return columns


def concatenate(shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns of several ranks, one after the other."""
    whole: dict[str, Any] = {}
    for name, first in shares[0].items():
        if isinstance(first, np.ndarray):
            whole[name] = np.concatenate([share[name] for share in shares])
        else:
            whole[name] = [value for share in shares for value in share[name]]
    return whole
