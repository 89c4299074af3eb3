"""One rollout batch's optimiser steps: the gradient depends on the rollouts alone, not on how they are cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ranks import on_ranks
from small_policy import VOCABULARY, make_policy, save_model

from clipo_ds.batching import collate
from clipo_ds.distributed import Ranks
from clipo_ds.experience import Experience, LiveScores
from clipo_ds.objectives import policy_loss, resolve_objective
from clipo_ds.rewards import Judgement
from clipo_ds.schema import (
    ContrastiveConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
)
from clipo_ds.types import Prompt, Rollout
from clipo_ds.update import Targets, update_policy

GROUPS, GROUP_SIZE = 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("update"))


def settings(**sections) -> TrainConfig:
    base = TrainConfig(
        model=ModelConfig(path="folder"),
        data=DataConfig(train=["x"], max_prompt_tokens=4),
        rollout=RolloutConfig(prompts_per_step=GROUPS, group_size=GROUP_SIZE, max_new_tokens=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        contrastive=None,
    )
    return dataclasses.replace(base, **sections)


def scored(policy, *, with_reference: bool = False) -> Experience:
    """Random rollouts, scored by the policy; the sampler's log-probabilities are off by a little."""
    generator = torch.Generator().manual_seed(2)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())

    flat = []
    for group in range(GROUPS):
        prompt = Prompt(group, "p", tokens(1, 5), "1", "test")
        for _ in range(GROUP_SIZE):
            ids = tokens(1, 9)
            flat.append((prompt, Rollout(ids, (0.0,) * len(ids), "r", False)))
    batch = collate(flat, [[row] for row in range(len(flat))], 0)
    scores = policy.score(batch)
    noise = 0.1 * torch.randn(scores.logprobs.shape, generator=generator) * batch.response_mask
    return Experience(
        flat=flat,
        judgements=[Judgement(True, "1", "verified", None, 1.0, 0.0, {}, 1.0)] * len(flat),
        group=torch.arange(len(flat)) // GROUP_SIZE,
        correct=torch.ones(len(flat), dtype=torch.bool),
        reward=torch.zeros(len(flat)),
        dropped=torch.zeros(len(flat), dtype=torch.bool),
        mask=batch.response_mask,
        rollout_logprobs=scores.logprobs + noise,
        old_logprobs=scores.logprobs + noise,  # the ratio is not 1: clipping and its gradient are exercised
        entropy=scores.entropy,
        pooled=scores.pooled,
        reference_logprobs=scores.logprobs - 0.3 * batch.response_mask if with_reference else None,
    )


def targets(pooled_gradient=None) -> Targets:
    """Group 1 has no variance; one rollout of group 2 sits on the mean."""
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 1.2, -1.2, 0.0, 0.3])
    return Targets(advantages, torch.arange(12) // GROUP_SIZE == 1, pooled_gradient)


def update(folder, ranks, config, change=lambda experience: experience, pull=None) -> dict[str, float]:
    policy = make_policy(folder, ranks, stage=0)
    experience = change(scored(policy, with_reference=config.objective.kl_coefficient > 0))
    objective = config.objective
    spec = resolve_objective(
        objective.name, aggregation=objective.aggregation, constant_length=config.rollout.max_new_tokens
    )
    gradient = None if pull is None else pull(experience)
    return update_policy(config, spec, policy, ranks, experience, targets(gradient), pad_token_id=0, step=1)


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "gspo", "gmpo"])
@pytest.mark.parametrize("aggregation", [None, "token_mean", "sequence_mean"])
def test_micro_batches_do_not_change_the_gradient_and_equal_the_plain_loss(folder, ranks, objective, aggregation):
    config = settings(objective=ObjectiveConfig(name=objective, aggregation=aggregation))
    whole = update(folder, ranks, config)
    small = update(folder, ranks, dataclasses.replace(config, optimizer=OptimizerConfig(max_tokens_per_micro_batch=13)))
    assert small["policy/grad_norm"] == pytest.approx(whole["policy/grad_norm"], rel=1e-5)
    assert small["policy/loss"] == pytest.approx(whole["policy/loss"], rel=1e-5, abs=1e-7)
    # the loss that the pure function gives for all rows at once, zero-variance rows included
    policy = make_policy(folder, ranks, stage=0)
    experience = scored(policy)
    logprobs = policy.score(collate(experience.flat, [[row] for row in range(12)], 0)).logprobs
    spec = resolve_objective(objective, aggregation=aggregation)
    expected = policy_loss(
        logprobs, experience.old_logprobs, targets().advantages, experience.mask, objective=objective,
        aggregation=spec.aggregation, constant_length=config.rollout.max_new_tokens,
    )  # fmt: skip
    assert whole["policy/loss"] == pytest.approx(float(expected), rel=1e-5, abs=1e-7)


def test_kl_leaves_zero_variance_groups_alone_unless_asked(folder, ranks):
    with_kl = settings(objective=ObjectiveConfig(kl_coefficient=0.5))
    on_all = settings(objective=ObjectiveConfig(kl_coefficient=0.5, kl_on_zero_variance=True))
    without = update(folder, ranks, settings())["policy/grad_norm"]
    some, everywhere = update(folder, ranks, with_kl), update(folder, ranks, on_all)
    assert some["policy/grad_norm"] != pytest.approx(without, rel=1e-3)
    assert everywhere["policy/grad_norm"] != pytest.approx(some["policy/grad_norm"], rel=1e-3)
    # k3 of a reference that is 0.3 nats lower everywhere: e^-0.3 + 0.3 - 1 = 0.0408
    assert everywhere["policy/kl_reference"] == pytest.approx(0.040818, rel=1e-3)


def test_dropped_groups_count_in_no_denominator(folder, ranks):
    def drop(experience):
        return dataclasses.replace(experience, dropped=experience.group == 1)

    config = settings(objective=ObjectiveConfig(name="dapo"))
    kept, all_rows = update(folder, ranks, config, drop), update(folder, ranks, config)
    policy = make_policy(folder, ranks, stage=0)
    tokens = scored(policy).mask.sum(1)
    share = float(tokens.sum() / tokens[torch.arange(12) // GROUP_SIZE != 1].sum())
    assert kept["policy/loss"] == pytest.approx(share * all_rows["policy/loss"], rel=1e-5)
    assert kept["policy/grad_norm"] == pytest.approx(share * all_rows["policy/grad_norm"], rel=1e-5)


def test_embedding_path_pulls_pooled_states_against_their_gradient(folder, ranks):
    contrastive = ContrastiveConfig(policy_loss_weight=2.0)
    small = OptimizerConfig(max_tokens_per_micro_batch=13)

    def pull(experience):
        return torch.ones_like(experience.pooled) / 100

    with_path = update(folder, ranks, settings(contrastive=contrastive), pull=pull)
    cut = update(folder, ranks, settings(contrastive=contrastive, optimizer=small), pull=pull)
    assert with_path["policy/grad_norm"] == pytest.approx(cut["policy/grad_norm"], rel=1e-5)
    # d/d(pooled): 2 * <pooled, 1/100> is added to the loss
    policy = make_policy(folder, ranks, stage=0)
    expected = update(folder, ranks, settings())["policy/loss"] + float(scored(policy).pooled.sum()) / 50
    assert with_path["policy/loss"] == pytest.approx(expected, rel=1e-4)


def test_mini_batches_and_epochs_take_that_many_steps(folder, ranks):
    # prompts_per_step 3, so 3 mini-batches of one prompt; the second has no variance and gives a zero gradient
    config = settings(optimizer=OptimizerConfig(learning_rate=1e-2, mini_batches=3, epochs_per_batch=2))
    metrics = update(folder, ranks, config)
    assert metrics["policy/grad_norm"] > 0
    # after the first epoch the policy has moved away from the one that is in old_logprobs
    assert metrics["policy/kl_old"] > update(folder, ranks, settings())["policy/kl_old"]


def test_kl_from_the_old_policy_is_estimated_on_its_own_samples(folder, ranks):
    metrics = update(folder, ranks, settings())
    policy = make_policy(folder, ranks, stage=0)
    experience = scored(policy)
    logprobs = policy.score(collate(experience.flat, [[row] for row in range(12)], 0)).logprobs
    trained = experience.mask & (targets().advantages != 0)[:, None]
    d = (logprobs - experience.old_logprobs)[trained]  # log(policy / old): exp(d) averages to 1 under the old policy
    assert metrics["policy/kl_old"] == pytest.approx(float((d.exp() - d - 1).mean()), rel=1e-4)
    assert metrics["policy/kl_old"] != pytest.approx(float((d.neg().exp() + d - 1).mean()), rel=1e-3)


def live(policy, experience, config) -> Experience:
    """As scored, but by a pass that has kept its graph; the rollouts lie in another order in it."""
    order = [[row] for row in (7, 3, 11, 0, 5, 1, 9, 2, 10, 4, 8, 6)]
    batch = collate(experience.flat, order, 0)
    scores = policy.forward(batch, with_entropy=True, pooled_gradient=config.pooled_states_learn)
    return dataclasses.replace(experience, live=LiveScores(batch.rows, scores))


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_an_update_from_the_scoring_pass_s_graph_is_the_same(folder, ranks, stage, weight):
    config = settings(
        objective=ObjectiveConfig(kl_coefficient=0.1), contrastive=ContrastiveConfig(policy_loss_weight=weight)
    )
    outcomes = []
    for keeps_graph in (False, True):
        # With AdamW's own eps a gradient that is all but zero moves its weight as far as any other, in a direction that
        # rounding decides; sums in another order round otherwise.
        policy = make_policy(folder, ranks, stage=stage, eps=1e-4)
        experience = scored(policy, with_reference=True)
        experience = dataclasses.replace(experience, dropped=experience.group == 0)  # although it has an advantage
        pull = torch.ones_like(experience.pooled) / 100 if weight else None
        if keeps_graph:
            experience = live(policy, experience, config)
        metrics = update_policy(
            config, resolve_objective("grpo"), policy, ranks, experience, targets(pull), pad_token_id=0, step=1
        )
        outcomes.append((metrics, policy.score(collate(experience.flat, [[row] for row in range(12)], 0)).logprobs))
    (metrics, logprobs), (live_metrics, live_logprobs) = outcomes
    assert live_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(live_logprobs, logprobs)
    assert not torch.allclose(logprobs, experience.old_logprobs, atol=1e-2)  # something was learnt


def share_of(ranks: Ranks, policy) -> tuple[Experience, Targets]:
    """What one of the ranks has of all groups."""
    share = ranks.share(GROUPS)
    rows = slice(share.start * GROUP_SIZE, share.stop * GROUP_SIZE)
    whole = scored(policy)
    tensors = {name: value for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
    own = dataclasses.replace(
        whole, flat=whole.flat[rows], judgements=whole.judgements[rows], **{n: t[rows] for n, t in tensors.items()}
    )
    return own, Targets(targets().advantages[rows], targets().zero_variance[rows], None)


def update_on(ranks: Ranks, folder: str, out: str) -> None:
    """Three mini-batches of one group each under ZeRO-3: on two ranks every one of them leaves a rank without rows."""
    policy = make_policy(folder, ranks, stage=3)
    own, pull = share_of(ranks, policy)
    config = settings(optimizer=OptimizerConfig(learning_rate=1e-2, mini_batches=GROUPS, epochs_per_batch=2))
    metrics = update_policy(config, resolve_objective("grpo"), policy, ranks, own, pull, pad_token_id=0, step=1)
    torch.save(metrics, f"{out}/{ranks.world_size}_{ranks.rank}.pt")


def update_from_graph_on(ranks: Ranks, folder: str, out: str) -> None:
    """A kept graph under ZeRO-3 with checkpointing: the second of two ranks has it, and no row that may learn."""
    policy = make_policy(folder, ranks, stage=3, gradient_checkpointing=True)
    own, pull = share_of(ranks, policy)
    own = dataclasses.replace(own, dropped=own.group == GROUPS - 1)
    if ranks.world_size == 2:
        batch = collate(own.flat, [[row] for row in range(len(own.flat))], 0)
        own = dataclasses.replace(own, live=LiveScores(batch.rows, policy.forward(batch, with_entropy=True)))
    metrics = update_policy(settings(), resolve_objective("grpo"), policy, ranks, own, pull, pad_token_id=0, step=1)
    torch.save(metrics, f"{out}/{ranks.world_size}_{ranks.rank}.pt")


@pytest.mark.parametrize("update_there", [update_on, update_from_graph_on])
def test_updates_are_the_same_on_one_rank_and_on_two(folder, tmp_path, update_there):
    for world_size in (1, 2):
        on_ranks(world_size, update_there, folder, str(tmp_path))
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert two[0] == two[1] == pytest.approx(one, rel=1e-4, abs=1e-7)
    assert one["policy/grad_norm"] > 0
