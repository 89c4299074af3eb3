"""The evaluation that a run makes of its own policy every n steps and at the end. Called by all ranks. Layer L3."""

from __future__ import annotations

from collections.abc import Sequence

from clipo_ds import distributed
from clipo_ds.evaluate import EvaluationResult, ProblemResult, response_columns, run_problems, summarise
from clipo_ds.parts import Parts
from clipo_ds.types import Prompt
from clipo_ds.unverified import unverified_in_words


def evaluate_if_due(parts: Parts, step: int) -> None:
    """Evaluate the sampler's weights, which are the policy's, on every test set that is not on record for this step.

    Nothing is done in a step that `evaluation.every` does not name; the last one always counts as named.

    Raises:
        Exception: On all ranks, what engine, verifier, writer or tracker raised on one of them.
    """
    every = parts.config.evaluation.every
    if every is None or (step != parts.config.steps and step % every != 0):
        return
    with distributed.together():
        found = None if parts.writer is None else parts.writer.evaluated(step)
    recorded = distributed.broadcast_object(found)
    results: dict[str, EvaluationResult] = {}
    for name, prompts in parts.tests.items():
        if name in recorded:
            continue
        gathered = distributed.gather_objects(_own_share(parts, prompts))
        with distributed.together():
            if gathered is not None:
                problems = [problem for share in gathered for problem in share]
                results[name] = summarise(name, problems)
                _record(parts, step, name, problems, results[name])
    parts.display.evaluation(step, results)


def _record(parts: Parts, step: int, name: str, problems: Sequence[ProblemResult], result: EvaluationResult) -> None:
    failed = [problem.unverified for problem in problems if problem.unverified is not None]
    parts.display.warn(unverified_in_words(failed, data=name), step)
    if parts.writer is not None:
        parts.writer.write_responses(step, name, response_columns(problems))
        parts.writer.write_evaluation(step, result.to_dict())
    flat = {f"evaluation/{name}/{key}": value for key, value in result.to_dict().items()}
    parts.trackers.log({k: v for k, v in flat.items() if isinstance(v, int | float)}, step)


def _own_share(parts: Parts, prompts: Sequence[Prompt]) -> list[ProblemResult]:
    config, setting = parts.config, parts.config.evaluation
    problems: list[ProblemResult] = []
    with distributed.together():
        problems = run_problems(
            parts.engine,
            [prompts[i] for i in parts.ranks.share(len(prompts))],
            parts.judge,
            samples=setting.samples,
            temperature=setting.temperature if setting.samples > 1 else 0.0,
            top_p=setting.top_p if setting.samples > 1 else 1.0,
            max_new_tokens=setting.max_new_tokens or config.rollout.max_new_tokens,
            seed=config.seed,
        )
    return problems
