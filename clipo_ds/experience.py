"""One rollout batch of a rank: sampled, judged and scored.

The first half of a training step: prompts [P] become groups [P, G], verdicts and rewards [N], and from one pass of the
training policy log-probabilities [N, T], entropies and pooled states [N, H].
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipo_ds import distributed
from clipo_ds.batching import (
    collate,
    equalise,
    flatten_groups,
    plan_micro_batches,
    sequence_length,
    share_prompts,
)
from clipo_ds.distributed import Ranks
from clipo_ds.generation import RolloutEngine
from clipo_ds.policy import Policy, Scores
from clipo_ds.rewards import Judge, Judgement
from clipo_ds.schema import TrainConfig
from clipo_ds.types import Batch, Group, Prompt, Rollout

logger = logging.getLogger(__name__)

JudgedGroup = tuple[Group, list[Judgement]]


@dataclass(frozen=True)
class SampledGroups:
    """The groups that a step trains on, and what dynamic sampling went through to get them."""

    groups: list[JudgedGroup]
    dropped: list[bool]  # [groups]: zero-variance fill that dynamic sampling found no replacement for
    unused: list[JudgedGroup]  # of all rounds on this rank, those that are not in `groups`
    rounds: int
    verify_seconds: float  # of the time that it all took, spent on verdicts and rewards
    staleness: int  # steps between the weights that sampled the first round and those that will be trained

    @property
    def every_group(self) -> list[JudgedGroup]:
        """All groups that this rank sampled in the step."""
        return self.groups + self.unused


@dataclass(frozen=True)
class LiveScores:
    """The scoring pass of a rank's whole batch with its graph, from which the update goes on without a forward."""

    rows: Sequence[int]  # [R], positions in the rank's flat list of rollouts; none on a rank that only keeps step
    scores: Scores  # of these rows; with gradients, on the device


@dataclass(frozen=True)
class Experience:
    """A rank's N rollouts with everything that the losses read. Tensors live on the CPU, `pooled` on the device."""

    flat: list[tuple[Prompt, Rollout]]  # [N], the rollouts of a group side by side
    judgements: list[Judgement]  # [N]
    group: Tensor  # Int[N], labels that no other rank uses
    correct: Tensor  # Bool[N]
    reward: Tensor  # Float[N], outcome and other rewards, before the contrastive one
    dropped: Tensor  # Bool[N], rows that dynamic sampling wanted to replace: they count in no loss
    mask: Tensor  # Bool[N, T]
    rollout_logprobs: Tensor  # Float[N, T], the sampler's
    old_logprobs: Tensor  # Float[N, T], the trainer's before the update
    entropy: Tensor  # Float[N, T], nats
    pooled: Tensor  # Float[N, H]
    reference_logprobs: Tensor | None  # Float[N, T]
    live: LiveScores | None = None  # on all ranks or on none


def sample_round(
    config: TrainConfig, engine: RolloutEngine, prompts: Sequence[Prompt], *, step: int, number: int
) -> list[Group]:
    """One rank's rollouts of one round of a step's sampling; no other rank takes part."""
    return engine.generate(
        prompts,
        config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
        seed=(config.seed * 1_000_003 + step) * 64 + number,
    )


def sample_groups(
    config: TrainConfig,
    engine: RolloutEngine,
    judge: Judge,
    ranks: Ranks,
    prompts: Sequence[Prompt],
    draw_more: Callable[[], Sequence[Prompt]],
    *,
    step: int,
    dynamic: bool,
    ready: list[Group] | None = None,
) -> SampledGroups:
    """Sample and judge G rollouts for this rank's share of the prompts.

    With dynamic sampling (DAPO, arXiv 2503.14476 sec. 3.2) groups whose outcomes are all right or all wrong are
    replaced by groups of fresh prompts, in at most `objective.max_sampling_rounds` rounds; then it says that it gave
    up, and the places that are left are filled with groups marked as dropped.

    Args:
        draw_more: Gives the next prompts of the *global* batch; called by all ranks alike.
        ready: The first round, where it was sampled a step ahead.

    Raises:
        Exception: On all ranks, what engine, verifier or reward function raised on one of them.
    """
    share = ranks.share(len(prompts))
    kept: list[JudgedGroup] = []
    spare: list[JudgedGroup] = []
    rounds = 0
    verify_seconds = 0.0
    while True:
        own = [prompts[i] for i in ranks.share(len(prompts))]
        with distributed.together():  # broken weights, a user's reward function, a verifier without memory, …
            if rounds == 0 and ready is not None:
                groups = ready
            else:
                groups = sample_round(config, engine, own, step=step, number=rounds)
            began = time.perf_counter()
            judged = judge.judge(groups)
            verify_seconds += time.perf_counter() - began
        rounds += 1
        for group, judgements in zip(groups, judged, strict=True):
            informative = 0 < sum(j.correct for j in judgements) < len(judgements)
            (kept if informative or not dynamic else spare).append((group, judgements))
        if not dynamic:
            break
        missing = distributed.max_over_ranks(len(share) - len(kept), ranks.device)
        if missing <= 0:
            break
        if rounds == config.objective.max_sampling_rounds:
            if ranks.is_main:
                logger.warning(
                    "step %d: dynamic sampling gave up after %d rounds, %d groups short on some rank "
                    "(objective.max_sampling_rounds; are the prompts too easy or too hard?)",
                    step, rounds, missing,
                )  # fmt: skip
            break
        prompts = draw_more()
    num_kept = min(len(kept), len(share))
    num_fill = len(share) - num_kept
    return SampledGroups(
        groups=kept[:num_kept] + spare[:num_fill],
        dropped=[False] * num_kept + [True] * num_fill,
        unused=kept[num_kept:] + spare[num_fill:],
        rounds=rounds,
        verify_seconds=verify_seconds,
        staleness=0 if ready is None else 1,
    )


def score_groups(
    config: TrainConfig,
    policy: Policy,
    ranks: Ranks,
    sampled: SampledGroups,
    *,
    pad_token_id: int,
    with_reference: bool,
    trains: bool,
) -> Experience:
    """Score a rank's groups under the training policy (and its reference) before the update; called by all ranks.

    Args:
        pad_token_id: Fills micro-batches.
        with_reference: Score under the reference policy too.
        trains: The update follows. Where it is one optimiser step on one micro-batch, the pass keeps its graph for it:
            the step takes one forward and one backward pass, not two and one.
    """
    flat = flatten_groups(group for group, _ in sampled.groups)
    judgements = [judgement for _, judged in sampled.groups for judgement in judged]
    size = config.rollout.group_size
    num_tokens = torch.tensor([len(rollout.token_ids) for _, rollout in flat], dtype=torch.long)
    longest = max(1, int(num_tokens.max())) if len(flat) else 1
    shape = (len(flat), longest)
    mask = torch.arange(longest)[None, :] < num_tokens[:, None]
    rollout_logprobs = torch.zeros(shape)
    if flat:
        rollout_logprobs[mask] = torch.tensor([p for _, rollout in flat for p in rollout.logprobs])
    old_logprobs, entropy = torch.zeros(shape), torch.zeros(shape)
    reference_logprobs = torch.zeros(shape) if with_reference else None
    pooled = torch.zeros(len(flat), policy.hidden_size, device=policy.device)
    batches = micro_batches(config, policy, ranks, flat, range(len(flat)), pad_token_id)
    keeps_graph = trains and len(batches) == 1 and _graph_pays(config, policy, ranks, sampled)
    live = None
    for batch in batches:
        reference = policy.score_reference(batch) if with_reference else None
        if keeps_graph:
            scores = policy.forward(batch, with_entropy=True, pooled_gradient=config.pooled_states_learn)
            live = LiveScores(() if batch.is_padding else batch.rows, scores)
        else:
            scores = policy.score(batch)
        if batch.is_padding:
            continue
        rows, width = torch.tensor(batch.rows), batch.response_mask.shape[1]
        old_logprobs[rows, :width] = scores.logprobs.detach().float().cpu()
        entropy[rows, :width] = scores.entropy.detach().float().cpu()
        pooled[rows.to(pooled.device)] = scores.pooled.detach()
        if reference_logprobs is not None and reference is not None:
            reference_logprobs[rows, :width] = reference.float().cpu()
    first_group = ranks.share(config.rollout.prompts_per_step).start
    return Experience(
        flat=flat,
        judgements=judgements,
        group=first_group + torch.arange(len(flat)) // size,
        correct=torch.tensor([j.correct for j in judgements], dtype=torch.bool),
        reward=torch.tensor([j.reward for j in judgements], dtype=torch.float32),
        dropped=torch.tensor(sampled.dropped, dtype=torch.bool).repeat_interleave(size),
        mask=mask,
        rollout_logprobs=rollout_logprobs,
        old_logprobs=old_logprobs,
        entropy=entropy,
        pooled=pooled,
        reference_logprobs=reference_logprobs,
        live=live,
    )


def _graph_pays(config: TrainConfig, policy: Policy, ranks: Ranks, sampled: SampledGroups) -> bool:
    """Whether an update from the scoring pass's own graph is the same as one from a forward of its own, and faster.

    A backward pass costs about two forward passes (fewer with LoRA, more with checkpointing), and through the kept
    graph it goes over all rows: 2 for each against 3 for each that learns. Groups that will learn nothing are known
    from their rewards, but for what the contrastive term may add to them. The same on all ranks.
    """
    if policy.draws_noise or config.optimizer.mini_batches * config.optimizer.epochs_per_batch > 1:
        return False
    learning = [
        not dropped
        and (
            len({judgement.reward for judgement in judged}) > 1
            or (config.contrastive is not None and any(judgement.correct for judgement in judged))
            or (config.objective.kl_coefficient > 0 and config.objective.kl_on_zero_variance)
        )
        for (_, judged), dropped in zip(sampled.groups, sampled.dropped, strict=True)
    ]
    tokens = [sum(len(rollout.token_ids) for rollout in group.rollouts) for group, _ in sampled.groups]
    total = distributed.sum_over_ranks(
        {
            "all": float(sum(tokens)),
            "learning": float(sum(count for count, learns in zip(tokens, learning, strict=True) if learns)),
        },
        ranks.device,
    )
    return 3 * total["learning"] >= 2 * total["all"]


def micro_batches(
    config: TrainConfig,
    policy: Policy,
    ranks: Ranks,
    flat: Sequence[tuple[Prompt, Rollout]],
    rows: Sequence[int],
    pad_token_id: int,
) -> list[Batch]:
    """Micro-batches of the given rows, sorted by length, as many as the busiest rank has (and at least one)."""
    budget = config.optimizer.max_tokens_per_micro_batch
    pairs_per_token = policy.pairs_per_token if config.optimizer.share_prompts else 0.0
    sequences = share_prompts(flat, rows, budget, pairs_per_token)
    plan = plan_micro_batches([sequence_length(flat, sequence) for sequence in sequences], budget)
    count = max(1, int(distributed.max_over_ranks(len(plan), ranks.device)))
    real = [collate(flat, [sequences[i] for i in micro], pad_token_id) for micro in plan]
    return equalise(real, count, pad_token_id)
