"""The loop: one step, top to bottom, in the order of the method.

    prompts [P] -> groups [P, G] -> verdicts and rewards [N] -> log-probabilities [N, T] and pooled states [N, H] in
    one pass -> embeddings [N, D] -> contrastive loss and reward [N] -> advantages [N] -> policy update -> weights to
    the sampler -> the run folder

Where it departs from the paper (arXiv 2603.10101): "correct" is the verifier's verdict, never a threshold on the
reward; dynamic sampling looks at outcomes alone, so the contrastive term cannot make an all-right group count as
informative; the optimiser steps of the head use the global number of valid anchors.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clipo_ds import distributed
from clipo_ds.advantages import group_advantages, zero_variance_groups
from clipo_ds.ahead import gap_after_sync
from clipo_ds.checkpoint import Progress, full_disk_in_words
from clipo_ds.contrastive_term import ContrastiveOutcome
from clipo_ds.distributed import Ranks
from clipo_ds.experience import Experience, SampledGroups, sample_groups, sample_round, score_groups
from clipo_ds.metrics import (
    contrastive_metrics,
    mismatch_metrics,
    rollout_metrics,
    unverified_problems,
    warnings_in_words,
)
from clipo_ds.parity import check_after_sync, check_parity
from clipo_ds.parts import Parts, build_parts, close_parts, preflight
from clipo_ds.periodic_evaluation import evaluate_if_due
from clipo_ds.rescue import attempt, how_to_go_on, mark, save, stop, stop_after_step, take_back
from clipo_ds.rows import concatenate, rollout_columns
from clipo_ds.schema import TrainConfig
from clipo_ds.turns import runs_on, turns_of
from clipo_ds.types import MismatchError, Prompt, RunStopped
from clipo_ds.unverified import unverified_in_words
from clipo_ds.update import Targets, update_policy
from clipo_ds.weight_sync import sync_weights


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves behind."""

    step: int  # 1 for the first
    metrics: dict[str, float]  # of all ranks
    rollouts: dict[str, Any]  # columns of the run folder's parquet, this rank's rollouts
    stopped_by: Exception | None = None  # on all ranks, after the update: the step is whole, but it is the last one


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under `time/<name>`."""
        began = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] = self.seconds.get(f"time/{name}", 0.0) + time.perf_counter() - began


def train(config: TrainConfig) -> Path:
    """Train as the configuration says; called by all ranks. Returns the run folder.

    Raises:
        InputError: Something the user gave is wrong. Found before any weight is loaded, and nothing is written; but for
            what the weights themselves show (`clipo_ds.start_check`), and a reward function that fails in a step.
        RunStopped: SIGINT or SIGTERM came; the step in progress was finished and a checkpoint written.
        FloatingPointError: Logits, embeddings or a gradient were not finite; no weight was changed by it.
        MismatchError: The sampler is another model than the trainer; nothing was learnt from what it sampled since.
        NotSaved: The disk does not take what the run writes; the message says what is whole.
        SamplerLost, VerifierLost: The sampler, or the verifier, cannot go on.

    Whatever ends the run after its first step names the checkpoint to go on from (`clipo_ds.rescue`).
    """
    ranks = distributed.start()
    plan = preflight(config, ranks)
    parts = build_parts(plan, ranks)
    try:
        with parts.display, stop_after_step(parts), full_disk_in_words(parts.run_dir):
            finished = run_loop(parts)
    finally:
        close_parts(parts)
    if not finished:
        raise RunStopped(how_to_go_on(parts))
    return parts.run_dir


def run_loop(parts: Parts) -> bool:
    """Train from where `parts.progress` stands to the last step; False when a stop was requested before the end.

    Raises:
        Exception: As `train`.
    """
    try:
        return _steps(parts)
    except Exception as error:  # whatever it is: a step that is whole is not lost to it
        stop(parts, error)


def _steps(parts: Parts) -> bool:
    config = parts.config
    evaluate_if_due(parts, parts.progress.step)  # an earlier start may have been cut off before it came to this
    while parts.progress.step < config.steps:
        step, before = parts.progress.step + 1, mark(parts)
        try:
            record = train_step(parts, parts.draw(), step)
        except Exception:
            take_back(parts, before)
            raise
        parts.progress = Progress(step, parts.progress.prompts_drawn)
        if record.stopped_by is not None:
            raise record.stopped_by
        last = step == config.steps
        evaluate_if_due(parts, step)
        # One rank's signal stops all of them, after the same step.
        stopping = bool(distributed.max_over_ranks(parts.stop_requested, parts.ranks.device))
        every = config.checkpoint.every
        if last or stopping or (every is not None and step % every == 0):
            save(parts)
        if stopping and not last:
            return False
    return True


def train_step(parts: Parts, prompts: Sequence[Prompt], step: int) -> StepRecord:
    """One step on the given prompts of the global batch; called by all ranks with the same prompts.

    Raises:
        FloatingPointError: Something was not finite. The weights are those before the bad update, and where the step
            came to be scored, its rollouts are in the run folder.
        MismatchError: The sampler is another model than the trainer. No weight was changed, the rollouts of the step
            are in the run folder.
        Exception: Before anything was learnt in this step. What goes wrong afterwards is in the record.
    """
    config, ranks = parts.config, parts.ranks
    watch = Stopwatch()
    with watch.phase("step"):
        sampled = _sample(parts, prompts, step, watch)
        with watch.phase("score"):
            experience = score_groups(
                config, parts.policy, ranks, sampled, pad_token_id=parts.tokenizer.pad_token_id,
                with_reference=config.objective.kl_coefficient > 0, trains=not _policy_is_frozen(config, step),
            )  # fmt: skip
        metrics, columns = _learn(parts, sampled, experience, step, watch)
        failures = [attempt(lambda: _hand_over(parts, experience, step, metrics, watch))]
        with watch.phase("record"):
            failures.append(attempt(lambda: _write_rollouts(parts, columns, step)))
    failures.append(attempt(lambda: _check_after_sync(parts, metrics, step)))
    metrics |= _speed(experience, sampled, watch, ranks)
    if parts.ahead is not None:
        metrics["rollout/staleness"] = float(sampled.staleness)
    failures.append(attempt(lambda: _tell(parts, metrics, columns, step)))
    return StepRecord(step, metrics, columns, next((error for error in failures if error is not None), None))


def _sample(parts: Parts, prompts: Sequence[Prompt], step: int, watch: Stopwatch) -> SampledGroups:
    """The step's groups with their verdicts; the next step's are begun where the sampler works beside the training."""
    with watch.phase("generate"):
        sampled = sample_groups(
            parts.config, parts.engine, parts.judge, parts.ranks, prompts, parts.draw,
            step=step, dynamic=parts.spec.dynamic_sampling,
            ready=None if parts.ahead is None else parts.ahead.take(step),
        )  # fmt: skip
    watch.seconds["time/verify"] = sampled.verify_seconds
    watch.seconds["time/generate"] -= sampled.verify_seconds
    if parts.ahead is not None and step < parts.config.steps:
        _sample_ahead(parts, step + 1)
    with distributed.together():
        parts.engine.sleep()
    return sampled


def _learn(
    parts: Parts, sampled: SampledGroups, experience: Experience, step: int, watch: Stopwatch
) -> tuple[dict[str, float], dict[str, Any]]:
    """Check the sampler, train head and policy; give the step's metrics and the columns of its rollouts.

    Raises:
        FloatingPointError, MismatchError: As `train_step`; the rollouts are written first.
    """
    config, ranks = parts.config, parts.ranks
    frozen = _policy_is_frozen(config, step)
    total_reward, targets = _targets(parts, experience, None)
    columns = _columns(parts, experience, None, total_reward, targets, step)
    try:
        metrics = mismatch_metrics(experience, ranks)
        check_parity(config, metrics, tied_head=parts.policy.has_tied_head, stale=sampled.staleness > 0)
        with watch.phase("contrastive"):
            outcome, contrast = _contrast(parts, experience, step)
        total_reward, targets = _targets(parts, experience, outcome)
        columns = _columns(parts, experience, outcome, total_reward, targets, step)
        metrics |= rollout_metrics(
            experience, sampled, total_reward, targets.zero_variance, ranks, reward_names=parts.judge.reward_names,
            runs_on=functools.partial(runs_on, parts.tokenizer, turns_of(parts.tokenizer)),
        )  # fmt: skip
        parts.display.warn(unverified_in_words(unverified_problems(sampled, metrics)), step)
        metrics |= contrast
        if not frozen:
            with watch.phase("update"):
                metrics |= update_policy(
                    config, parts.spec, parts.policy, ranks, experience, targets,
                    pad_token_id=parts.tokenizer.pad_token_id, step=step,
                )  # fmt: skip
    except (FloatingPointError, MismatchError) as error:
        unwritten = attempt(lambda: _write_rollouts(parts, columns, step))
        rollouts = "are written" if unwritten is None else f"could not be written ({unwritten})"
        raise type(error)(f"step {step}: {error}; its rollouts {rollouts}") from error
    return metrics, columns


def _policy_is_frozen(config: TrainConfig, step: int) -> bool:
    return config.contrastive is not None and step <= config.contrastive.head_warmup_steps


def _targets(parts: Parts, experience: Experience, outcome: ContrastiveOutcome | None) -> tuple[Tensor, Targets]:
    """What every rollout earns, Float[N], and what the update makes of it."""
    total = experience.reward if outcome is None else experience.reward + outcome.reward.cpu()
    advantages = group_advantages(total, experience.group, normalize=parts.spec.advantage_normalize)
    zero_variance = zero_variance_groups(total, experience.group)
    return total, Targets(advantages, zero_variance, None if outcome is None else outcome.pooled_gradient)


def _columns(
    parts: Parts,
    experience: Experience,
    outcome: ContrastiveOutcome | None,
    total_reward: Tensor,
    targets: Targets,
    step: int,
) -> dict[str, Any]:
    return rollout_columns(
        experience, outcome, total_reward, targets.advantages,
        reward_names=parts.judge.reward_names, step=step, with_embeddings=parts.config.logging.save_embeddings,
    )  # fmt: skip


def _hand_over(parts: Parts, experience: Experience, step: int, metrics: dict[str, float], watch: Stopwatch) -> None:
    """The new weights to the sampler. Adds `mismatch/after_sync…` to the metrics.

    Raises:
        Exception: On all ranks, what went wrong with the next step's rollouts or with the sync.
    """
    config = parts.config
    # A server's weights must not change under a request.
    with watch.phase("generate"):
        distributed.raise_everywhere(None if parts.ahead is None else parts.ahead.failure())
    with watch.phase("sync"):
        with distributed.together():
            parts.engine.wake()
        if not _policy_is_frozen(config, step):
            sync_weights(parts.policy.model, parts.engine)
        if parts.ahead is not None:
            metrics |= gap_after_sync(
                config, parts.policy, parts.ahead.engine, parts.ranks, experience,
                pad_token_id=parts.tokenizer.pad_token_id,
            )  # fmt: skip


def _check_after_sync(parts: Parts, metrics: dict[str, float], step: int) -> None:
    try:
        check_after_sync(parts.config, metrics, tied_head=parts.policy.has_tied_head)
    except MismatchError as error:
        raise MismatchError(f"step {step}, after its update: {error}; its rollouts are written") from error


def _sample_ahead(parts: Parts, step: int) -> None:
    """Begin to sample this rank's share of the prompts that `step` will draw, beside whatever comes now."""
    prompts = parts.peek()
    own = [prompts[i] for i in parts.ranks.share(len(prompts))]
    assert parts.ahead is not None
    parts.ahead.start(step, functools.partial(sample_round, parts.config, parts.ahead.engine, own, step=step, number=0))


def _contrast(parts: Parts, experience: Experience, step: int) -> tuple[ContrastiveOutcome | None, dict[str, float]]:
    """The contrastive term on a scored batch: its outcome under the head as it stands, then the head's own step.

    This is the one place where `contrastive: null` differs from a run with the term.
    """
    term = parts.term
    if term is None:
        return None, {}
    device = experience.pooled.device
    correct, group = experience.correct.to(device), experience.group.to(device)
    kept = ~experience.dropped.to(device)
    outcome = term.judge(experience.pooled, correct, group, kept, step)
    metrics = contrastive_metrics(experience, outcome, term.config.floor, parts.ranks)
    for prefix, vectors in (("", outcome.embeddings), ("pooled_", experience.pooled)):
        positive, negative = term.similarities(vectors[kept], correct[kept], group[kept])
        metrics[f"contrastive/{prefix}positive_similarity"] = positive
        metrics[f"contrastive/{prefix}negative_similarity"] = negative
    metrics["contrastive/head_norm"] = term.head_norm()
    metrics["contrastive/head_grad_norm"] = term.learn(experience.pooled, correct, group, kept, step, outcome.num_valid)
    return outcome, metrics


def _write_rollouts(parts: Parts, columns: dict[str, Any], step: int) -> None:
    """Bring the ranks' rows together on rank 0 and write them."""
    gathered = distributed.gather_objects(columns)
    with distributed.together():
        if gathered is not None and parts.writer is not None:
            parts.writer.write_rollouts(step, concatenate(gathered))


def _tell(parts: Parts, metrics: dict[str, float], rollouts: dict[str, Any], step: int) -> None:
    """The step's numbers to the run folder, the trackers and the terminal."""
    with distributed.together():
        if parts.writer is not None:
            parts.writer.write_metrics(step, metrics)
        parts.trackers.log(metrics, step)
        parts.display.warn(warnings_in_words(parts.config, metrics), step)
        parts.display.step(step, metrics, rollouts)


def _speed(experience: Experience, sampled: SampledGroups, watch: Stopwatch, ranks: Ranks) -> dict[str, float]:
    """Seconds by phase on the slowest rank, and tokens a second of all ranks."""
    seconds = {name: distributed.max_over_ranks(value, ranks.device) for name, value in sorted(watch.seconds.items())}
    tokens = distributed.sum_over_ranks(
        {
            "tokens/prompt": float(sum(len(prompt.token_ids) for prompt, _ in experience.flat)),
            "tokens/response": float(experience.mask.sum()),
            "tokens/sampled": float(
                sum(len(rollout.token_ids) for group, _ in sampled.every_group for rollout in group.rollouts)
            ),
        },
        ranks.device,
    )
    trained = tokens["tokens/prompt"] + tokens["tokens/response"]
    passes = seconds["time/score"] + seconds.get("time/update", 0.0)
    if sampled.staleness == 0:  # otherwise the time is what was left to wait for
        tokens["throughput/generate"] = tokens["tokens/sampled"] / max(seconds["time/generate"], 1e-9)
    return {
        **seconds,
        **tokens,
        "sampling/rounds": float(sampled.rounds),
        "throughput/update": trained / max(passes, 1e-9),
    }
