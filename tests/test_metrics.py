"""Means over ranks and warnings in words; the README's table of metrics is made from the program's."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from clipo_ds.experience import Experience, SampledGroups
from clipo_ds.metrics import (
    METRICS,
    Means,
    mismatch_metrics,
    rollout_metrics,
    unverified_problems,
    warnings_in_words,
)
from clipo_ds.rewards import Judgement
from clipo_ds.schema import DataConfig, ModelConfig, RolloutConfig, TrainConfig
from clipo_ds.types import Group, Prompt, Rollout
from clipo_ds.unverified import Unverified

README = Path(__file__).parents[1] / "README.md"
OPENING, CLOSING = "<!-- metrics -->\n", "<!-- /metrics -->"


def readme_with_table() -> str:
    text = README.read_text(encoding="utf-8")
    rows = "".join(f"| `{name}` | {meaning.replace('|', '&#124;')} |\n" for name, meaning in METRICS.items())
    start, stop = text.index(OPENING) + len(OPENING), text.index(CLOSING)
    return f"{text[:start]}\n| key in metrics.jsonl | meaning |\n|---|---|\n{rows}\n{text[stop:]}"


def test_readme_lists_every_metric():
    if not README.exists():
        pytest.skip("there is no README.md beside the package")
    assert README.read_text(encoding="utf-8") == readme_with_table(), "run `python tests/test_metrics.py`"


def a_step(sampler: list[float], trainer: list[float], correct: list[bool], group_size: int = 2):
    """The experience of one-token rollouts, and the groups that it comes from."""
    size = len(correct)
    judgements = [Judgement(c, "1", "verified", None, float(c), 0.0, {}, float(c)) for c in correct]
    prompt, rollouts = Prompt(0, "p", (1,), "1", "test"), [Rollout((2,), (p,), "r", False) for p in sampler]
    judged = [
        (Group(prompt, tuple(rollouts[at : at + group_size])), judgements[at : at + group_size])
        for at in range(0, size, group_size)
    ]
    experience = Experience(
        flat=[(prompt, rollout) for rollout in rollouts],
        judgements=judgements,
        group=torch.arange(size) // group_size,
        correct=torch.tensor(correct, dtype=torch.bool),
        reward=torch.tensor(correct).float(),
        dropped=torch.zeros(size, dtype=torch.bool),
        mask=torch.ones(size, 1, dtype=torch.bool),
        rollout_logprobs=torch.tensor(sampler)[:, None],
        old_logprobs=torch.tensor(trainer)[:, None],
        entropy=torch.zeros(size, 1),
        pooled=torch.zeros(size, 3),
        reference_logprobs=None,
    )
    return experience, SampledGroups(judged, [False] * len(judged), [], 1, 0.0, 0)


def test_mismatch_kl_is_that_of_the_trainer_from_the_sampler(ranks):
    # Two tokens of probability 3/4 and 1/4 to the sampler, 1/4 and 3/4 to the trainer, as often as the sampler gives
    # them: KL(sampler || trainer) = 3/4 ln 3 - 1/4 ln 3.
    often, seldom = math.log(0.75), math.log(0.25)
    experience, _ = a_step([often] * 3 + [seldom], [seldom] * 3 + [often], [True, False] * 2)
    metrics = mismatch_metrics(experience, ranks)
    assert metrics["mismatch/kl"] == pytest.approx(math.log(3) / 2, rel=1e-5)
    assert metrics["mismatch/mean_abs"] == pytest.approx(math.log(3), rel=1e-5)


def test_each_mean_is_over_what_is_trained_on_scored_or_sampled(ranks):
    # Four groups of two: two trained on, one fill that was dropped, and beside them one that was sampled and not used.
    experience, sampled = a_step([-1.0] * 8, [-1.0] * 8, [True, False, True, False, True, True, False, False])
    sampled = replace(sampled, groups=sampled.groups[:3], dropped=[False, False, True], unused=sampled.groups[3:])
    six = {
        field.name: value[:6]
        for field in fields(Experience)
        if isinstance(value := getattr(experience, field.name), list | torch.Tensor)
    }
    experience = replace(experience, **six | {"dropped": torch.arange(6) >= 4})
    equal = torch.tensor([True, True, False, False, True, True])
    metrics = rollout_metrics(
        experience, sampled, experience.reward + 1, equal, ranks, reward_names=(), runs_on=lambda r: r.text == "r"
    )
    assert metrics["response/runs_on"] == 1.0
    assert metrics["reward/mean"] == metrics["accuracy/trained"] == 0.5
    assert metrics["reward/total"] == 1.5
    assert metrics["groups/zero_variance"] == 0.5  # of the two that are trained on
    assert metrics["accuracy/mean"] == 0.5
    assert metrics["groups/all_correct"] == metrics["groups/all_wrong"] == 0.25
    assert metrics["sampling/unused"] == 0.5
    assert metrics["response/length_correct"] == metrics["response/length_wrong"] == 1.0


def test_rewards_have_the_judges_names_also_where_there_are_no_rows(ranks):
    experience, sampled = a_step([-1.0] * 2, [-1.0] * 2, [True, False])
    judgements = [
        replace(j, overlong=-0.5, other={"short": v}) for j, v in zip(experience.judgements, (1, 4), strict=True)
    ]
    names = ("overlong", "short")
    some = rollout_metrics(
        replace(experience, judgements=judgements), sampled, experience.reward, torch.zeros(2) > 0, ranks,
        reward_names=names,
    )  # fmt: skip
    assert (some["reward/overlong"], some["reward/short"]) == (-0.5, 2.5)
    nothing, no_groups = a_step([], [], [])
    none = rollout_metrics(nothing, no_groups, nothing.reward, torch.zeros(0) > 0, ranks, reward_names=names)
    assert list(none) == list(some)
    assert math.isnan(none["reward/short"])


def test_answers_that_could_not_be_verified_are_counted_and_their_problems_given(ranks):
    experience, sampled = a_step([-1.0] * 4, [-1.0] * 4, [True, False, False, False])
    none = torch.zeros(4, dtype=torch.bool)
    metrics = rollout_metrics(experience, sampled, experience.reward, none, ranks, reward_names=())
    assert metrics["verifier/timeout"] == metrics["verifier/error"] == 0
    assert unverified_problems(sampled, metrics) == []
    (group, judgements), other = sampled.groups
    failed = [judgements[0], replace(judgements[1], status="timeout", endless_truth=True)]
    sampled = replace(sampled, groups=[(group, failed)], unused=[other])
    metrics = rollout_metrics(experience, sampled, experience.reward, none, ranks, reward_names=())
    assert (metrics["verifier/timeout"], metrics["verifier/error"]) == (0.25, 0)
    assert unverified_problems(sampled, metrics) == [Unverified("test, problem 0", 1, 0, True)]


def test_means_divide_sums_by_counts_and_are_nan_over_nothing(ranks):
    means = Means()
    values = torch.tensor([1.0, 2.0, 6.0])
    means.add("all", values)  # 9 / 3
    means.add("some", values, torch.tensor([True, False, True]))  # 7 / 2
    means.add("none", values, torch.zeros(3, dtype=torch.bool))
    means.add("shares", torch.tensor([True, False, False, False]))  # 1 / 4
    reduced = means.reduce(ranks)
    assert reduced["all"] == 3
    assert reduced["some"] == 3.5
    assert math.isnan(reduced["none"])
    assert reduced["shares"] == 0.25


def test_warnings_name_the_setting():
    config = TrainConfig(
        model=ModelConfig(path="m"), data=DataConfig(train=["x"]), rollout=RolloutConfig(max_new_tokens=77)
    )
    quiet = {
        "response/truncated": 0.1,
        "groups/zero_variance": 0.5,
        "accuracy/mean": 0.5,
        "groups/all_correct": 0.25,
        "groups/all_wrong": 0.5,
        "sampling/rounds": 4,
    }
    assert warnings_in_words(config, quiet) == {}
    loud = {
        "response/truncated": 0.97,
        "response/runs_on": 0.4,
        "groups/zero_variance": 0.9,
        "accuracy/mean": 0.02,
        "groups/all_correct": 0.0,
        "groups/all_wrong": 0.95,
        "sampling/rounds": 4,
        "contrastive/floor_share": 0.6,
    }
    found = warnings_in_words(config, loud)
    assert "rollout.max_new_tokens = 77" in found["truncated"]
    assert "40%" in found["runs_on"] and "rollout.stop" in found["runs_on"]
    assert "hard" in found["zero_variance"]
    assert "95%" in found["uninformative"] and "hard" in found["uninformative"]
    assert "uninformative" not in warnings_in_words(config, loud | {"sampling/rounds": 1})  # nothing was sampled anew
    assert "contrastive.reward_centering" in found["floor"]


if __name__ == "__main__":
    README.write_text(readme_with_table(), encoding="utf-8")
