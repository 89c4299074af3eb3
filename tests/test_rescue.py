"""What stops a run leaves a checkpoint wherever the weights are whole; from there it goes on as if nothing had been."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from launching import SMALL, comparable, metrics

from clipo_ds import distributed, periodic_evaluation, trainer
from clipo_ds.answers import AnswerVerifier
from clipo_ds.checkpoint import Progress
from clipo_ds.config import load_config
from clipo_ds.generation import TransformersEngine
from clipo_ds.parts import close_parts
from clipo_ds.policy import Policy
from clipo_ds.records import RunWriter, open_run
from clipo_ds.rescue import mark, take_back
from clipo_ds.trackers import Trackers
from clipo_ds.types import InputError, MismatchError, NotSaved

CPU = f"--ds_config={Path(__file__).parents[1]}/ds_configs/zero3_cpu.json"
# The head learns before the policy does; two optimiser steps a batch.
SETTINGS = [
    *SMALL[1:], CPU, "--steps=3", "--optimizer.learning_rate=1e-2", "--contrastive.head=linear",
    "--optimizer.mini_batches=2", "--logging.show_every=null",
]  # fmt: skip
REWARD = """
from pathlib import Path
calls = []
def moody(responses):
    calls.append(1)
    file = Path(__file__).with_name("mood")
    if file.exists() and len(calls) == 2:
        file.unlink()
        raise ZeroDivisionError("not today")
    return [1.0 / len(response) for response in responses]
"""

Patch = pytest.MonkeyPatch


def train(folder: Path, *flags: str) -> None:
    reward = f"--reward.functions={{function: '{folder.parent.parent}/mine.py:moody', weight: 0.1}}"
    try:
        trainer.train(load_config("demo", [*SETTINGS, reward, f"--run_dir={folder}", *flags]))
    finally:
        distributed.stop()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """Three steps, beside which the runs of the tests lie in folders of their own."""
    folder = tmp_path_factory.mktemp("rescue")
    (folder / "mine.py").write_text(REWARD)
    train(folder / "whole" / "run")
    return folder / "whole" / "run"


@pytest.fixture
def folder(uninterrupted: Path, request: pytest.FixtureRequest) -> Path:
    name = request.node.name.partition("[")[0]
    folder = uninterrupted.parents[1] / f"{name}_{len(list(uninterrupted.parents[1].iterdir()))}"
    folder.mkdir()
    return folder / "run"


def in_call(number: int, what: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """The function or method, but its `number`-th call is another's, which is given it too."""
    calls = []

    def replaced(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return instead(what, *arguments, **options) if len(calls) == number else what(*arguments, **options)

    return replaced


def fails(error: Exception) -> Callable[..., NoReturn]:
    def instead(*_: Any, **__: Any) -> NoReturn:
        raise error

    return instead


# -- what stops a run in its second step, or after it ------------------------------------------------------------------


def a_skipped_sync(patch: Patch, _: Path) -> None:
    # The first sync is in clipo_ds.parts.
    patch.setattr(trainer, "sync_weights", in_call(1, trainer.sync_weights, lambda *_: None))


def a_gradient_that_is_not_finite(patch: Patch, _: Path) -> None:
    # In the third backward pass: two optimiser steps make a rollout batch, each of one micro-batch.
    def broken(backward: Any, policy: Policy, loss: Any, *, last: bool) -> None:
        backward(policy, loss * math.nan, last=last)

    patch.setattr(Policy, "backward", in_call(3, Policy.backward, broken))


def a_reward_function_that_raises(_: Patch, folder: Path) -> None:
    (folder.parents[1] / "mood").touch()


def a_verifier_that_breaks(patch: Patch, _: Path) -> None:
    error = RuntimeError("can't start new thread")
    patch.setattr(AnswerVerifier, "verify_many", in_call(2, AnswerVerifier.verify_many, fails(error)))


def a_sampler_that_breaks(patch: Patch, _: Path) -> None:
    error = MemoryError("no room for the cache")
    patch.setattr(TransformersEngine, "generate", in_call(2, TransformersEngine.generate, fails(error)))


def a_disk_that_takes_no_rollouts(patch: Patch, _: Path) -> None:
    error = OSError(28, "No space left on device")
    patch.setattr(RunWriter, "write_rollouts", in_call(1, RunWriter.write_rollouts, fails(error)))


def a_tracker_that_breaks(patch: Patch, _: Path) -> None:
    patch.setattr(Trackers, "log", in_call(1, Trackers.log, fails(ConnectionError("the tracker is gone"))))


def an_update_that_did_not_arrive(patch: Patch, _: Path) -> None:
    error = MismatchError("mismatch/after_sync_mean = 1")
    patch.setattr(trainer, "check_after_sync", in_call(1, trainer.check_after_sync, fails(error)))


def an_evaluation_that_breaks(patch: Patch, _: Path) -> list[str]:
    # Two test sets before the first step, and the first of them after it.
    error = TimeoutError("no answer")
    patch.setattr(periodic_evaluation, "run_problems", in_call(3, periodic_evaluation.run_problems, fails(error)))
    return ["--evaluation.every=1", "--evaluation.max_problems=2"]


@pytest.mark.parametrize(
    ("sabotage", "kind", "words"),
    [
        (an_update_that_did_not_arrive, MismatchError, "step 1, after its update: mismatch/after_sync_mean = 1"),
        (an_evaluation_that_breaks, TimeoutError, "no answer"),
        (a_skipped_sync, MismatchError, "step 2: mismatch/max_abs = "),
        (a_gradient_that_is_not_finite, FloatingPointError, "step 2: the gradient is not finite (epoch 0, mini-b"),
        (a_reward_function_that_raises, InputError, "must not raise, got ZeroDivisionError: not today"),
        (a_verifier_that_breaks, RuntimeError, "can't start new thread"),
        (a_sampler_that_breaks, MemoryError, "no room for the cache"),
        (a_disk_that_takes_no_rollouts, NotSaved, "No space left"),
        (a_tracker_that_breaks, ConnectionError, "the tracker is gone"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_whole_weights_are_saved_and_the_run_goes_on_from_them_to_the_bit(
    uninterrupted: Path, folder: Path, sabotage: Callable[..., list[str] | None], kind: type[Exception], words: str
) -> None:
    with Patch.context() as patch:
        flags = sabotage(patch, folder) or []
        with pytest.raises(kind) as caught:
            train(folder, *flags)
    checkpoint = folder / "checkpoints" / "step_000001"
    line = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert words in line
    assert line.endswith(f"stopped after step 1 of 3; go on with --resume {checkpoint}")
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step_000001"]
    train(folder, f"--resume={checkpoint}")
    rows = [[comparable(row) for row in metrics(run) if row["step"] > 1] for run in (uninterrupted, folder)]
    assert rows[1] == rows[0]


def test_weights_in_the_middle_of_a_steps_updates_are_not_saved(folder: Path) -> None:
    def broken(backward: Any, policy: Policy, loss: Any, *, last: bool) -> None:
        backward(policy, loss * math.nan, last=last)

    with Patch.context() as patch, pytest.raises(FloatingPointError) as caught:
        patch.setattr(Policy, "backward", in_call(4, Policy.backward, broken))
        train(folder)
    assert str(caught.value) == (
        "step 2: the gradient is not finite (epoch 0, mini-batch 1 of this rollout batch); its rollouts are written; "
        "step 1 of 3 is not saved: an optimiser step of step 2 has changed its weights; there is no earlier checkpoint"
    )
    assert not (folder / "checkpoints").exists()


def test_weights_that_are_no_numbers_end_a_step_with_one_line_and_are_not_saved(folder: Path) -> None:
    def poisoned(score: Any, config: Any, policy: Policy, *arguments: Any, **options: Any) -> Any:
        for parameter in policy.model.parameters():
            for held in (parameter.data, parameter.ds_tensor):
                held.fill_(math.nan)
        return score(config, policy, *arguments, **options)

    with Patch.context() as patch, pytest.raises(MismatchError) as caught:
        patch.setattr(trainer, "score_groups", in_call(2, trainer.score_groups, poisoned))
        train(folder)
    assert str(caught.value) == (
        "step 2: mismatch/mean_abs = nan: the trainer gives sampled tokens log-probabilities that are not finite. Its "
        "weights or its forward pass are broken; its rollouts are written; step 1 of 3 is not saved: its weights are "
        "not finite; there is no earlier checkpoint"
    )
    assert open_run(folder).rollouts(step=2).num_rows == 32
    assert not (folder / "checkpoints").exists()


def test_a_checkpoint_that_cannot_be_written_either_hides_nothing(folder: Path) -> None:
    with Patch.context() as patch, pytest.raises(InputError) as caught:
        a_reward_function_that_raises(patch, folder)
        patch.setattr("clipo_ds.rescue.save_checkpoint", fails(OSError(28, "No space left on device")))
        train(folder)
    line = str(caught.value)
    assert "ZeroDivisionError: not today" in line
    assert line.endswith(
        "step 1 of 3 is not saved: saving it failed (OSError: [Errno 28] No space left on device); "
        "there is no earlier checkpoint"
    )


def test_saving_that_fails_by_itself_is_not_tried_again(folder: Path) -> None:
    calls: list[int] = []

    def full(*_: Any, **__: Any) -> NoReturn:
        calls.append(1)
        raise OSError(28, "No space left on device")

    with Patch.context() as patch, pytest.raises(NotSaved, match="No space left") as caught:
        patch.setattr("clipo_ds.rescue.save_checkpoint", full)
        train(folder, "--checkpoint.every=1")
    assert str(caught.value).endswith("; step 1 of 3 is not saved: saving it failed; there is no earlier checkpoint")
    assert calls == [1]


def test_the_first_step_has_nothing_to_save(folder: Path) -> None:
    with Patch.context() as patch, pytest.raises(MismatchError, match=r"; no step was finished$"):
        patch.setattr(trainer, "check_parity", fails(MismatchError("another model")))
        train(folder)
    assert not (folder / "checkpoints").exists()


def test_a_step_that_is_taken_back_draws_the_same_random_numbers_again() -> None:
    parts: Any = SimpleNamespace(progress=Progress(1, 4), policy=SimpleNamespace(updates_begun=0), term=None)
    before = mark(parts)
    drawn = [float(torch.rand(())), np.random.rand(), random.random()]
    take_back(parts, before)
    assert [float(torch.rand(())), np.random.rand(), random.random()] == drawn


def test_the_folder_is_given_back_although_the_sampler_does_not_close() -> None:
    closed: list[str] = []
    parts: Any = SimpleNamespace(
        engine=SimpleNamespace(close=fails(RuntimeError("it hangs"))),
        judge=SimpleNamespace(close=lambda: closed.append("judge")),
        trackers=SimpleNamespace(finish=lambda: closed.append("trackers")),
        folder=SimpleNamespace(release=lambda: closed.append("folder")),
    )
    with pytest.raises(RuntimeError, match="it hangs"):
        close_parts(parts)
    assert closed == ["judge", "trackers", "folder"]
