"""Every shape annotation of the pure layer, inner functions included, checked by machine on ordinary input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKED = """
from jaxtyping import install_import_hook

modules = ("grouping", "contrastive_kernels", "contrastive", "advantages", "objectives")
with install_import_hook([f"clipo_ds.{name}" for name in modules], "beartype.beartype"):
    from clipo_ds import advantages, contrastive, objectives

import itertools
import torch

generator = torch.Generator().manual_seed(0)
group = torch.cat([torch.zeros(300), torch.arange(1, 101).repeat_interleave(4), torch.tensor([999, 999, -5])]).int()
N = len(group)
embeddings = torch.nn.functional.normalize(torch.randn(N, 5, generator=generator), dim=1).requires_grad_()
correct = torch.rand(N, generator=generator) < 0.5
for loss, level, similarity, denominator in itertools.product(
    contrastive.LOSSES, contrastive.LEVELS, contrastive.SIMILARITIES, contrastive.DENOMINATORS
):
    words = dict(loss=loss, level=level, similarity=similarity, denominator=denominator)
    result = contrastive.contrastive_loss(embeddings, correct, group, **words)
    result.mean.backward()
reward = contrastive.contrastive_reward(result.per_rollout, result.valid)
contrastive.centred_contrastive_reward(result.per_rollout, result.valid, group)
contrastive.shuffle_within_groups(reward, result.valid, group, generator=generator)
contrastive.within_group_similarity(embeddings, correct, group)
for kind in contrastive.DEBIAS_KINDS:
    contrastive.debias_states(embeddings, group, kind)
for kind in contrastive.HEAD_KINDS:
    contrastive.ContrastiveHead(5, 3, kind)(embeddings)
advantage = advantages.group_advantages(reward, group)
advantages.zero_variance_groups(reward, group)
logprobs = -torch.rand(N, 3, generator=generator)
mask = torch.rand(N, 3, generator=generator) < 0.7
for name, aggregation in itertools.product(objectives.OBJECTIVES, objectives.AGGREGATIONS):
    words = dict(objective=name, aggregation=aggregation, dual_clip=3.0)
    objectives.policy_loss(logprobs, logprobs - 0.1, advantage, mask, **words)
objectives.kl_estimate(logprobs, logprobs - 0.1)
objectives.importance_weights(logprobs, logprobs - 0.1, mask)
"""


def test_shapes_of_the_pure_layer_are_what_its_annotations_say():
    # A process of its own: the import hook has to come before the modules are first imported.
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", CHECKED], check=False, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
