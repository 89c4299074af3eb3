"""A rollout batch: what dynamic sampling keeps and counts, and when the scoring pass keeps its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from small_policy import make_policy, save_model

from clipo_ds.experience import SampledGroups, sample_groups, score_groups
from clipo_ds.rewards import Judge, Judgement
from clipo_ds.schema import (
    ContrastiveConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from clipo_ds.types import Group, Prompt, Rollout


class Answers:
    """A sampler that gives two responses to a prompt: as many right ones as the prompt's text says."""

    def generate(self, prompts: Sequence[Prompt], group_size: int, **_) -> list[Group]:
        right, wrong = (Rollout((1,), (-1.0,), rf"\boxed{{{n}}}", False) for n in (1, 2))
        return [Group(prompt, tuple([right] * int(prompt.text) + [wrong] * 2)[:group_size]) for prompt in prompts]


def sampled_from(ranks, *rounds: Sequence[int], dynamic: bool = True) -> SampledGroups:
    """What a step samples when its prompts, two a round, have so many right answers; it may take three rounds."""
    config = TrainConfig(
        model=ModelConfig(path="m"),
        data=DataConfig(train=["x"]),
        rollout=RolloutConfig(prompts_per_step=2, group_size=2),
        objective=ObjectiveConfig(max_sampling_rounds=3),
    )
    batches = iter([[Prompt(0, str(right), (1,), "1", "test") for right in batch] for batch in rounds])
    with Judge(RewardConfig(), max_new_tokens=10) as judge:
        return sample_groups(
            config, Answers(), judge, ranks, next(batches), lambda: next(batches), step=1, dynamic=dynamic
        )


def texts(groups) -> list[str]:
    return [group.prompt.text for group, _ in groups]


@pytest.mark.parametrize(
    ("rounds", "groups", "dropped", "unused"),
    [
        ([(1, 1)], "11", [False, False], ""),
        ([(2, 1), (0, 1)], "11", [False, False], "20"),
        ([(2, 1), (1, 1)], "11", [False, False], "12"),  # one more than there are places
        ([(2, 1), (0, 0), (2, 2)], "12", [False, True], "0022"),
        ([(0, 0), (0, 2), (2, 2)], "00", [True, True], "0222"),
    ],
)
def test_groups_without_contrast_are_replaced_or_marked_as_dropped(ranks, rounds, groups, dropped, unused):
    sampled = sampled_from(ranks, *rounds)
    assert ("".join(texts(sampled.groups)), sampled.dropped, sampled.rounds) == (groups, dropped, len(rounds))
    assert "".join(texts(sampled.unused)) == unused
    assert sorted(texts(sampled.every_group)) == sorted(str(right) for batch in rounds for right in batch)


def test_without_dynamic_sampling_every_group_is_trained_on(ranks):
    sampled = sampled_from(ranks, (2, 0), dynamic=False)
    assert (texts(sampled.groups), sampled.dropped, sampled.unused) == (["2", "0"], [False, False], [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("experience"))


@pytest.mark.parametrize(
    ("keeps", "right", "sections", "changes"),
    [
        (True, (1, 1, 1), {}, {}),
        (True, (1, 2, 1), {}, {}),  # two of three groups learn: 2 passes over all rows, or 3 over two thirds
        (False, (1, 2, 0), {}, {}),
        (True, (1, 2, 0), {"contrastive": ContrastiveConfig()}, {}),  # what is all right may still be told apart
        (False, (1, 0, 0), {"contrastive": ContrastiveConfig()}, {}),
        (True, (2, 0, 0), {"objective": ObjectiveConfig(kl_coefficient=0.1, kl_on_zero_variance=True)}, {}),
        (False, (1, 1, 1), {"optimizer": OptimizerConfig(mini_batches=3)}, {}),
        (False, (1, 1, 1), {"optimizer": OptimizerConfig(epochs_per_batch=2)}, {}),
        (False, (1, 1, 1), {"optimizer": OptimizerConfig(max_tokens_per_micro_batch=10)}, {}),
        (False, (1, 1, 1), {}, {"trains": False}),
        (False, (1, 1, 1), {}, {"dropped": [True, True, False]}),
        (False, (1, 1, 1), {}, {"dropout": 0.1}),
    ],
)
def test_the_scoring_pass_keeps_its_graph_where_the_update_is_one_step_on_the_same_rows(
    folder, ranks, keeps, right, sections, changes
):
    base = TrainConfig(
        model=ModelConfig(path="m"),
        data=DataConfig(train=["x"], max_prompt_tokens=5),
        rollout=RolloutConfig(prompts_per_step=3, group_size=2, max_new_tokens=5),
        contrastive=None,
    )
    config = dataclasses.replace(base, **sections)
    prompts = [Prompt(n, "p", (3, 4, 5), "1", "test") for n in range(3)]
    groups = [Group(prompt, (Rollout((6, 7), (-1.0, -1.0), "r", False),) * 2) for prompt in prompts]
    judged = [[judgement(n < count) for n in range(2)] for count in right]
    sampled = SampledGroups(
        list(zip(groups, judged, strict=True)), changes.get("dropped", [False] * 3), [],
        rounds=1, verify_seconds=0.0, staleness=0,
    )  # fmt: skip
    lora = LoraConfig(rank=2, alpha=4, dropout=changes["dropout"]) if "dropout" in changes else None
    policy = make_policy(folder, ranks, stage=0, lora=lora)
    experience = score_groups(
        config, policy, ranks, sampled, pad_token_id=0, with_reference=False, trains=changes.get("trains", True)
    )
    assert (experience.live is not None) == keeps
    assert not experience.old_logprobs.requires_grad
    assert not experience.pooled.requires_grad
    assert (experience.entropy > 0).all()
    plain = score_groups(config, policy, ranks, sampled, pad_token_id=0, with_reference=False, trains=False)
    for name in ("old_logprobs", "entropy", "pooled"):
        torch.testing.assert_close(getattr(experience, name), getattr(plain, name))


def judgement(correct: bool) -> Judgement:
    return Judgement(correct, "1", "verified", None, float(correct), 0.0, {}, float(correct))
