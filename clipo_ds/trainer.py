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
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from clipo_ds import distributed
from clipo_ds.advantages import group_advantages, zero_variance_groups
from clipo_ds.ahead import gap_after_sync
from clipo_ds.checkpoint import Progress, newest_checkpoint, save_checkpoint
from clipo_ds.contrastive_term import ContrastiveOutcome
from clipo_ds.distributed import Ranks
from clipo_ds.experience import Experience, SampledGroups, sample_groups, sample_round, score_groups
from clipo_ds.metrics import contrastive_metrics, mismatch_metrics, rollout_metrics, warnings_in_words
from clipo_ds.parity import check_after_sync, check_parity
from clipo_ds.parts import Parts, build_parts, close_parts, preflight
from clipo_ds.periodic_evaluation import evaluate_if_due
from clipo_ds.rows import concatenate, rollout_columns
from clipo_ds.schema import TrainConfig
from clipo_ds.turns import runs_on, turns_of
from clipo_ds.types import MismatchError, Prompt, RunStopped, SamplerLost
from clipo_ds.update import Targets, update_policy
from clipo_ds.weight_sync import sync_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """What a step leaves behind."""

    step: int  # 1 for the first
    metrics: dict[str, float]  # of all ranks
    rollouts: dict[str, Any]  # columns of the run folder's parquet, this rank's rollouts
    sampler_lost: SamplerLost | None = None  # after the update: the step is whole, but it is the last one


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
        InputError: Something the user gave is wrong; found before any weight is loaded, and nothing is written.
        RunStopped: SIGINT or SIGTERM came; the step in progress was finished and a checkpoint written.
        FloatingPointError: A gradient was not finite; no weight was changed by it.
        MismatchError: The sampler is another model than the trainer; nothing was learnt from its rollouts.
        SamplerLost: The sampler cannot go on; the message names the checkpoint of the last whole step.
    """
    ranks = distributed.start()
    plan = preflight(config, ranks)
    parts = build_parts(plan, ranks)
    try:
        with parts.display, _stop_after_step(parts):
            finished = run_loop(parts)
    finally:
        close_parts(parts)
    if not finished:
        raise RunStopped(_how_to_go_on(parts))
    return parts.run_dir


def run_loop(parts: Parts) -> bool:
    """Train from where `parts.progress` stands to the last step; False when a stop was requested before the end.

    Raises:
        SamplerLost: As `train`.
    """
    try:
        return _steps(parts)
    except SamplerLost as error:
        if parts.progress.step == 0:
            raise SamplerLost(f"{error}; no step was finished") from error
        if not (_checkpoint_path(parts) / "checkpoint.json").exists():
            _save(parts)
        raise SamplerLost(f"{error}; {_how_to_go_on(parts)}") from error


def _steps(parts: Parts) -> bool:
    config = parts.config
    evaluate_if_due(parts, parts.progress.step)  # an earlier start may have been cut off before it came to this
    while parts.progress.step < config.steps:
        step, before = parts.progress.step + 1, parts.progress
        try:
            record = train_step(parts, parts.draw(), step)
        except SamplerLost:  # while it sampled: nothing has been learnt from the prompts drawn
            parts.progress = before
            raise
        parts.progress = Progress(step, parts.progress.prompts_drawn)
        parts.display.step(step, record.metrics, record.rollouts)
        if record.sampler_lost is not None:
            raise record.sampler_lost
        last = step == config.steps
        evaluate_if_due(parts, step)
        # One rank's signal stops all of them, after the same step.
        stopping = bool(distributed.max_over_ranks(parts.stop_requested, parts.ranks.device))
        every = config.checkpoint.every
        if last or stopping or (every is not None and step % every == 0):
            _save(parts)
        if stopping and not last:
            return False
    return True


def train_step(parts: Parts, prompts: Sequence[Prompt], step: int) -> StepRecord:
    """One step on the given prompts of the global batch; called by all ranks with the same prompts.

    Raises:
        FloatingPointError: A gradient was not finite. The weights are those before the bad update, the rollouts of the
            step are in the run folder.
        MismatchError: The sampler is another model than the trainer. No weight was changed, the rollouts of the step
            are in the run folder.
        SamplerLost: The sampler was lost before anything was learnt in this step.
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
        sampler_lost = _hand_over(parts, experience, step, metrics, watch)
        with watch.phase("record"):
            _write_rollouts(parts, columns, step)
    try:
        check_after_sync(config, metrics, tied_head=parts.policy.has_tied_head)
    except MismatchError as error:
        raise MismatchError(f"step {step}, after its update: {error}; {_what_is_left(parts)}") from error
    metrics |= _speed(experience, sampled, watch, ranks)
    if parts.ahead is not None:
        metrics["rollout/staleness"] = float(sampled.staleness)
    record = StepRecord(step, metrics, columns, sampler_lost)
    if parts.writer is not None:
        parts.writer.write_metrics(step, metrics)
    parts.trackers.log(metrics, step)
    parts.display.warn(warnings_in_words(config, metrics), step)
    return record


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
        metrics |= contrast
        if not frozen:
            with watch.phase("update"):
                metrics |= update_policy(
                    config, parts.spec, parts.policy, ranks, experience, targets,
                    pad_token_id=parts.tokenizer.pad_token_id, step=step,
                )  # fmt: skip
    except (FloatingPointError, MismatchError) as error:
        _write_rollouts(parts, columns, step)
        raise type(error)(f"step {step}: {error}; {_what_is_left(parts)}") from error
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


def _hand_over(
    parts: Parts, experience: Experience, step: int, metrics: dict[str, float], watch: Stopwatch
) -> SamplerLost | None:
    """The new weights to the sampler; what it was lost to, where it was. Adds `mismatch/after_sync…` to the
    metrics."""
    config = parts.config
    frozen = _policy_is_frozen(config, step)
    try:
        # A server's weights must not change under a request.
        with watch.phase("generate"):
            distributed.raise_everywhere(None if parts.ahead is None else parts.ahead.failure())
        with watch.phase("sync"):
            parts.engine.wake()
            if not frozen:
                sync_weights(parts.policy.model, parts.engine)
            if parts.ahead is not None:
                metrics |= gap_after_sync(
                    config, parts.policy, parts.ahead.engine, parts.ranks, experience,
                    pad_token_id=parts.tokenizer.pad_token_id,
                )  # fmt: skip
    except (FloatingPointError, SamplerLost) as error:  # of the next step's rollouts, or of the sync
        return SamplerLost(str(error))
    return None


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
    if gathered is None or parts.writer is None:
        return
    parts.writer.write_rollouts(step, concatenate(gathered))


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


def _save(parts: Parts) -> None:
    path = save_checkpoint(
        parts.run_dir, parts.progress, parts.policy, parts.tokenizer, parts.term, parts.ranks,
        keep=parts.config.checkpoint.keep,
    )  # fmt: skip
    logger.info("checkpoint %s", path)


def _checkpoint_path(parts: Parts) -> Path:
    return parts.run_dir / "checkpoints" / f"step_{parts.progress.step:06d}"


def _how_to_go_on(parts: Parts) -> str:
    done = f"stopped after step {parts.progress.step} of {parts.config.steps}"
    return f"{done}; go on with --resume {_checkpoint_path(parts)}"


def _what_is_left(parts: Parts) -> str:
    """For the message of a step that failed before anything was learnt from it."""
    kept = newest_checkpoint(parts.run_dir)
    rest = f"the newest checkpoint is {kept}" if kept else "there is no checkpoint yet"
    return f"its rollouts are written, {rest}"


@contextlib.contextmanager
def _stop_after_step(parts: Parts) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end the run after the step it comes in; a second SIGINT interrupts at once."""

    def request(number: int, frame: FrameType | None) -> None:
        if parts.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not parts.stop_requested:  # the launcher passes a terminal's ctrl-C on as SIGTERM
            parts.display.say("stop requested: finishing this step, then writing a checkpoint (ctrl-C again: at once)")
        parts.stop_requested = True

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
