"""Dynamic sampling: what is kept, what fills the places that are left, and that all that was sampled is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from clipo_ds.experience import SampledGroups, sample_groups
from clipo_ds.rewards import Judge
from clipo_ds.schema import DataConfig, ModelConfig, ObjectiveConfig, RewardConfig, RolloutConfig, TrainConfig
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
