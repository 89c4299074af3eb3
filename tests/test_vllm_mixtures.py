"""Mixtures of experts in vLLM: every expert of a policy reaches the sampler, or the sync says which did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixtures import EXPERTS, make_mixture
from small_policy import make_policy

from clipo_ds.batching import collate, flatten_groups
from clipo_ds.distributed import Ranks
from clipo_ds.policy import Policy
from clipo_ds.types import Group, Prompt
from clipo_ds.vllm_engine import VllmEngine
from clipo_ds.vllm_loading import reload_weights
from clipo_ds.warm_start import build_tokenizer
from clipo_ds.weight_sync import iterate_original_weights, sync_weights

pytestmark = pytest.mark.vllm

PROMPTS = [Prompt(uid, "", (4 + uid, 12, 3, 12, 5, 13), "0", "test") for uid in range(2)]


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_reaches_the_sampler_under_its_folders_names(
    family: str, ranks: Ranks, tmp_path: Path
) -> None:
    make_mixture(family, tmp_path)
    policy = make_policy(str(tmp_path), ranks, stage=3)
    engine = VllmEngine(
        str(tmp_path), build_tokenizer(), [1], dtype="float32", max_model_len=64, max_sequences=8,
        kv_cache_bytes=16 * 1024**2,
    )  # fmt: skip
    try:
        for _ in range(2):
            sync_weights(policy.model, engine)
            groups = engine.generate(PROMPTS, 4, max_new_tokens=12, seed=0)
            assert update(policy, groups) < 1e-4
        assert update(policy, groups) > 0.01  # what moved is to be seen
        rest = [(n, w.clone()) for n, w in iterate_original_weights(policy.model) if ".experts." not in n]
        (left_out,) = engine._llm.collective_rpc(reload_weights, args=(rest,))
        assert len(left_out) == 4 and all(".experts." in name for name in left_out)
    finally:
        engine.close()


def update(policy: Policy, groups: list[Group]) -> float:
    """The largest |trainer - sampler| log-probability; then one optimiser step away from these rollouts."""
    flat = flatten_groups(groups)
    batch = collate(flat, [[row] for row in range(len(flat))], 0)
    scores = policy.forward(batch)
    sampled = torch.zeros_like(scores.logprobs)
    sampled[batch.response_mask] = torch.tensor([p for _, rollout in flat for p in rollout.logprobs])
    gap = float((scores.logprobs.detach() - sampled)[batch.response_mask].abs().max())
    policy.backward(scores.logprobs.sum() / 10, last=True)
    policy.step()
    return gap
