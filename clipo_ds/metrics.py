"""The numbers of one training step, reduced over ranks; their names are the flat keys of metrics.jsonl.

Every mean is a sum over a count, both added up over ranks before they are divided. A mean over nothing is NaN here and
null in the file. What each key means is said in `METRICS`, which the README's table is made from.

Where dynamic sampling replaces groups, a step samples more rollouts than it scores, and scores more than it trains on:
places that found no replacement are filled with groups marked as dropped. A mean is over one of the three.

    all sampled     what the policy makes of the prompts: `accuracy/mean`, `process/…`, `groups/all_…`, `verifier/…`,
                    `sampling/…`
    all scored      what the texts are like token by token: `response/…`, `mismatch/…`, `policy/entropy`
    trained on      what is learnt from: `reward/…`, `accuracy/trained`, `groups/zero_variance`, `contrastive/…`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clipo_ds import distributed
from clipo_ds.contrastive_term import ContrastiveOutcome
from clipo_ds.distributed import Ranks
from clipo_ds.experience import Experience, SampledGroups
from clipo_ds.objectives import kl_estimate
from clipo_ds.rewards import Judgement
from clipo_ds.schema import TrainConfig
from clipo_ds.types import Rollout
from clipo_ds.unverified import Unverified, unverified

METRICS = {
    "reward/mean": "mean reward before the contrastive term",
    "reward/total": "mean reward with the contrastive term",
    "reward/overlong": "mean overlong penalty (with reward.overlong_buffer, by default for dapo)",
    "reward/…": "mean value of each of reward.functions by its name, before its weight; the import path is the name of "
    "functions called alike and of those called mean, total or overlong",
    "accuracy/mean": "share of right final answers in all rollouts sampled, also those that dynamic sampling replaced",
    "accuracy/trained": "the same in the rollouts trained on",
    "process/checked": "share of rollouts whose steps could be checked",
    "process/consistent": "share of checked rollouts without a false step",
    "process/consistent_among_correct": "share of checked rollouts with a right answer that have no false step",
    "groups/zero_variance": "share of groups whose total rewards are all equal (they teach nothing)",
    "groups/all_correct": "share of all groups sampled with right answers only",
    "groups/all_wrong": "share of all groups sampled with wrong answers only",
    "response/length": "mean response length, tokens",
    "response/length_correct": "mean response length of right answers, tokens",
    "response/length_wrong": "mean response length of wrong answers, tokens",
    "response/truncated": "share of responses that reached the length cap",
    "response/runs_on": "share of responses that go on into another turn, in the chat template's own words for one",
    "verifier/no_answer": "share of all rollouts sampled in which no final answer was found",
    "verifier/timeout": "share of all rollouts sampled whose verification was stopped at its time limit, twice",
    "verifier/error": "share of all rollouts sampled in whose verification the algebra failed",
    "policy/entropy": "mean entropy of the policy at the sampled positions, nats a token",
    "policy/loss": "policy loss, mean over the step's updates",
    "policy/grad_norm": "gradient norm before clipping, mean over the step's updates",
    "policy/clip_low": "share of trained tokens clipped at the lower bound of the ratio",
    "policy/clip_high": "share of trained tokens clipped at the upper bound of the ratio",
    "policy/kl_old": "KL(old policy || policy), k3 on the old policy's samples, nats a token",
    "policy/kl_reference": "KL from the frozen reference, nats a token (with objective.kl_coefficient)",
    "policy/learning_rate": "learning rate of the next update",
    "mismatch/mean_abs": "mean |trainer - sampler| log-probability of the sampled tokens",
    "mismatch/p999_abs": "99.9th percentile of the same over all tokens of all ranks; of fewer than 2,000 tokens the "
    "second largest",
    "mismatch/max_abs": "largest |trainer - sampler| log-probability of the sampled tokens",
    "mismatch/kl": "KL(sampler || trainer), k3 on the sampler's samples, nats a token",
    "mismatch/after_sync": "as max_abs, one rollout a rank scored anew after every sync (async_steps)",
    "mismatch/after_sync_mean": "as mean_abs, of the server whose mean is largest, likewise",
    "mismatch/after_sync_p999": "as p999_abs, over the tokens of all ranks and servers, likewise",
    "rollout/staleness": "steps between the weights that sampled and those trained (with rollout.async_steps)",
    "contrastive/loss": "mean contrastive loss over valid anchors, before the head's update",
    "contrastive/valid_anchors": "valid anchors in the global batch",
    "contrastive/valid_share": "valid anchors as a share of right answers",
    "contrastive/reward": "mean contrastive reward over valid anchors",
    "contrastive/reward_process_right": "mean contrastive reward of valid anchors without a false step",
    "contrastive/reward_process_wrong": "mean contrastive reward of valid anchors with a false step",
    "contrastive/reward_gap": "the former minus the latter: above 0 the term favours right reasoning",
    "contrastive/floor_share": "share of valid anchors whose contrastive reward is the floor",
    "contrastive/positive_similarity": "mean cosine of embeddings, right with right, within groups",
    "contrastive/negative_similarity": "mean cosine of embeddings, right with wrong, within groups",
    "contrastive/pooled_positive_similarity": "mean cosine of pooled states, right with right, within groups",
    "contrastive/pooled_negative_similarity": "mean cosine of pooled states, right with wrong, within groups",
    "contrastive/head_norm": "norm of the head's weights",
    "contrastive/head_grad_norm": "norm of the head's gradient",
    "sampling/rounds": "rounds of generation that dynamic sampling took",
    "sampling/unused": "share of all groups sampled that were not trained on",
    "tokens/prompt": "prompt tokens in the global batch, each rollout counted",
    "tokens/response": "response tokens in the global batch",
    "tokens/sampled": "response tokens of all rollouts sampled, also those that dynamic sampling replaced",
    "time/…": "seconds on the slowest rank: generate (waiting for it, with rollout.async_steps), verify, score, "
    "contrastive, update, sync, record, step",
    "throughput/generate": "response tokens sampled a second, all ranks",
    "throughput/update": "tokens of prompt and response a second through scoring and update, all ranks",
}


class Means:
    """Collects sums and counts under names, and reduces all of them over ranks in one go."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Add the mean of `values`, over the True entries of `where` only when it is given."""
        chosen = values.double() if where is None else values.double()[where]
        self.add_sum(name, float(chosen.sum()), chosen.numel())

    def add_sum(self, name: str, total: float, count: float) -> None:
        """Add a sum and the count that divides it."""
        self._sums[name] = (total, count)

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """Means over all ranks; NaN where the count is 0."""
        flat = {
            f"{name}|{part}": value for name, pair in self._sums.items() for part, value in zip("sn", pair, strict=True)
        }
        total = distributed.sum_over_ranks(flat, ranks.device)
        return {
            name: total[f"{name}|s"] / total[f"{name}|n"] if total[f"{name}|n"] else math.nan for name in self._sums
        }


def rollout_metrics(
    experience: Experience,
    sampled: SampledGroups,
    total_reward: Tensor,
    zero_variance: Tensor,
    ranks: Ranks,
    *,
    reward_names: Sequence[str],
    runs_on: Callable[[Rollout], bool] = lambda rollout: False,
) -> dict[str, float]:
    """What the rollouts of a step are like: rewards, answers, steps, groups, lengths, entropy.

    Args:
        experience: This rank's rows.
        sampled: The groups that they come from, and those that were sampled beside them.
        total_reward: Float[N], with the contrastive term.
        zero_variance: Bool[N], the total rewards of the row's group are all equal.
        ranks: The means are over all of them.
        reward_names: `Judge.reward_names`, on every rank the same.
        runs_on: Whether a response goes on into another turn.
    """
    means = Means()
    _add_trained(means, experience, total_reward, zero_variance, reward_names)
    _add_sampled(means, sampled)
    lengths = experience.mask.sum(1)
    means.add("response/length", lengths)
    means.add("response/length_correct", lengths, experience.correct)
    means.add("response/length_wrong", lengths, ~experience.correct)
    means.add("response/truncated", torch.tensor([rollout.truncated for _, rollout in experience.flat]))
    means.add("response/runs_on", torch.tensor([runs_on(rollout) for _, rollout in experience.flat]))
    means.add("policy/entropy", experience.entropy, experience.mask)
    return means.reduce(ranks)


def _add_trained(
    means: Means, experience: Experience, total_reward: Tensor, zero_variance: Tensor, reward_names: Sequence[str]
) -> None:
    """Means over the rows that are trained on."""
    kept = ~experience.dropped
    means.add("reward/mean", experience.reward, kept)
    means.add("reward/total", total_reward, kept)
    for name in reward_names:
        means.add(f"reward/{name}", torch.tensor([j.value(name) for j in experience.judgements]), kept)
    means.add("accuracy/trained", experience.correct, kept)
    means.add("groups/zero_variance", zero_variance, kept)


def _add_sampled(means: Means, sampled: SampledGroups) -> None:
    """Means over all that was sampled, whatever became of it."""
    groups = [judgements for _, judgements in sampled.every_group]
    rollouts = [judgement for judgements in groups for judgement in judgements]
    correct = torch.tensor([j.correct for j in rollouts], dtype=torch.bool)
    checked, consistent = _process(rollouts)
    means.add("accuracy/mean", correct)
    means.add("process/checked", checked)
    means.add("process/consistent", consistent, checked)
    means.add("process/consistent_among_correct", consistent, checked & correct)
    means.add("groups/all_correct", torch.tensor([all(j.correct for j in judgements) for judgements in groups]))
    means.add("groups/all_wrong", torch.tensor([not any(j.correct for j in judgements) for judgements in groups]))
    for status in ("no_answer", "timeout", "error"):
        means.add(f"verifier/{status}", torch.tensor([j.status == status for j in rollouts]))
    means.add_sum("sampling/unused", len(sampled.unused) + sum(sampled.dropped), len(groups))


def unverified_problems(sampled: SampledGroups, metrics: Mapping[str, float]) -> list[Unverified]:
    """The problems of a step with answers that could not be verified, on rank 0; called by all ranks.

    Args:
        sampled: This rank's groups.
        metrics: Of `rollout_metrics`, on every rank the same.
    """
    if not metrics["verifier/timeout"] + metrics["verifier/error"]:
        return []
    own = unverified((group.prompt, judgements) for group, judgements in sampled.every_group)
    return [problem for share in distributed.gather_objects(own) or () for problem in share]


def _process(judgements: Sequence[Judgement]) -> tuple[Tensor, Tensor]:
    """Bool[N] each: the steps could be checked; they were and none is false."""
    verdicts = [judgement.process_consistent for judgement in judgements]
    return torch.tensor([v is not None for v in verdicts]).bool(), torch.tensor([v is True for v in verdicts]).bool()


def mismatch_metrics(experience: Experience, ranks: Ranks) -> dict[str, float]:
    """How far the sampler's log-probabilities of the sampled tokens are from the trainer's.

    Where a difference is no number, the largest is infinite.
    """
    means = Means()
    difference = (experience.old_logprobs - experience.rollout_logprobs)[experience.mask].abs()
    means.add("mismatch/mean_abs", difference)
    means.add("mismatch/kl", kl_estimate(experience.rollout_logprobs, experience.old_logprobs, "k3"), experience.mask)
    reduced = means.reduce(ranks)
    difference = difference.nan_to_num(nan=math.inf)  # which a maximum over ranks would lose
    reduced["mismatch/p999_abs"] = percentile_999(difference, ranks)
    largest = float(difference.max()) if difference.numel() else 0.0
    reduced["mismatch/max_abs"] = distributed.max_over_ranks(largest, ranks.device)
    return reduced


def percentile_999(values: Tensor, ranks: Ranks) -> float:
    """The 99.9th percentile of the Float[M_r] of all ranks together, whatever M_r is on each; 0 where there are none.

    Exact, by nearest rank: of M values the (M // 1000 + 1)-th largest, but never the largest of several, since one
    token is to decide nothing. It is among the largest of each rank, so that these alone are brought together.
    """
    total = int(distributed.sum_over_ranks({"count": values.numel()}, ranks.device)["count"])
    if total == 0:
        return 0.0
    place = min(max(2, total // 1000 + 1), total)
    own = values.float().topk(min(place, values.numel())).values
    everyone, _ = distributed.gather_rows(own.to(ranks.device))
    return float(everyone.topk(place).values[-1])


def contrastive_metrics(
    experience: Experience, outcome: ContrastiveOutcome, floor: float, ranks: Ranks
) -> dict[str, float]:
    """What the contrastive term says, and whether it tells right from wrong reasoning among the right answers."""
    means = Means()
    reward, valid = outcome.reward.cpu(), outcome.valid.cpu()
    checked, consistent = _process(experience.judgements)
    means.add("contrastive/valid_share", valid, experience.correct & ~experience.dropped)
    means.add("contrastive/reward", reward, valid)
    means.add("contrastive/reward_process_right", reward, valid & checked & consistent)
    means.add("contrastive/reward_process_wrong", reward, valid & checked & ~consistent)
    means.add("contrastive/floor_share", reward <= floor, valid)
    reduced = means.reduce(ranks)
    gap = reduced["contrastive/reward_process_right"] - reduced["contrastive/reward_process_wrong"]
    loss = outcome.mean_loss if outcome.num_valid else math.nan
    return {
        "contrastive/loss": loss,
        "contrastive/valid_anchors": outcome.num_valid,
        **reduced,
        "contrastive/reward_gap": gap,
    }


def warnings_in_words(config: TrainConfig, metrics: dict[str, float]) -> dict[str, str]:
    """What in a step's numbers means that the run is not learning, in words that name the setting, by kind."""
    warnings: dict[str, str] = {}
    if metrics["response/truncated"] > 0.5:
        warnings["truncated"] = (
            f"{metrics['response/truncated']:.0%} of the responses were cut at rollout.max_new_tokens = "
            f"{config.rollout.max_new_tokens}; raise it, or they can never be right"
        )
    if metrics.get("response/runs_on", 0.0) > 0.2:
        warnings["runs_on"] = (
            f"{metrics['response/runs_on']:.0%} of the responses go on into an invented turn, and may be judged by the "
            "answer in it; name what ends a response in rollout.stop"
        )
    ease = "easy" if metrics["accuracy/mean"] > 0.5 else "hard"
    if metrics["groups/zero_variance"] > 0.8:
        warnings["zero_variance"] = (
            f"in {metrics['groups/zero_variance']:.0%} of the groups all rewards are equal, which teaches nothing; the "
            f"prompts are too {ease} for this model (try objective.dynamic_sampling true, or other data.train)"
        )
    uninformative = metrics["groups/all_correct"] + metrics["groups/all_wrong"]
    if metrics["sampling/rounds"] > 1 and uninformative > 0.8:
        warnings["uninformative"] = (
            f"dynamic sampling found all answers right or all wrong in {uninformative:.0%} of the groups; the prompts "
            f"are too {ease} for this model (try other data.train)"
        )
    if config.contrastive is not None and metrics.get("contrastive/floor_share", 0.0) > 0.5:
        warnings["floor"] = (
            f"{metrics['contrastive/floor_share']:.0%} of the contrastive rewards sit at contrastive.floor = "
            f"{config.contrastive.floor} and say nothing; try contrastive.reward_centering group, a smaller "
            "contrastive.weight or more contrastive.head_warmup_steps"
        )
    return warnings
