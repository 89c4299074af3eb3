"""How a run stops before its end: what is whole of it is saved first, and its last line says where that is.

Weights are whole between two steps: before the first optimiser step of a rollout batch, and after its last. Whatever
stops the run there leaves a checkpoint (of the step before, whose successor is made again, or of the step itself). Not
saved are weights in the middle of a step's optimiser steps, which belong to no step and would learn from a part of the
batch twice; weights that are not finite, which nothing can be made of; and those of several ranks of which one alone
has failed, since saving takes them all and the others wait elsewhere. Called by all ranks alike. Layer L3.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from clipo_ds import distributed, types
from clipo_ds.checkpoint import (
    Progress,
    folder_of,
    newest_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from clipo_ds.parts import Parts
from clipo_ds.types import MismatchError, NotSaved

logger = logging.getLogger(__name__)

T = TypeVar("T")

ALIKE = (FloatingPointError, MismatchError)
"""What follows from numbers that all ranks share, so that all raise it."""


@dataclass(frozen=True)
class Mark:
    """Where a run stands between two steps."""

    progress: Progress
    updates_begun: int
    head: dict[str, Any] | None
    random: dict[str, Any]


def mark(parts: Parts) -> Mark:
    """Remember where the run stands, before a step."""
    head = None if parts.term is None else parts.term.state()
    return Mark(parts.progress, parts.policy.updates_begun, head, random_state())


def take_back(parts: Parts, before: Mark) -> None:
    """Forget a step that failed: its prompts and random numbers will be drawn again, and the head has learnt nothing.

    Where the policy has, `parts.is_between_steps` says from now on that its weights belong to no step.
    """
    parts.progress = before.progress
    parts.is_between_steps = parts.policy.updates_begun == before.updates_begun
    restore_random_state(before.random)  # an adapter's dropout has drawn by the time that a gradient is found broken
    if parts.term is not None and before.head is not None:
        parts.term.restore(before.head)


def attempt(action: Callable[[], object]) -> Exception | None:
    """Do something after an update, when the step is whole whatever happens; gives what went wrong on all ranks.

    An error of one rank alone is raised: the others are elsewhere.
    """
    try:
        action()
    except Exception as error:  # saved for, and raised again, by `stop`
        if not _is_alike(error):
            raise
        return error
    return None


def stop(parts: Parts, error: Exception) -> NoReturn:
    """Save what is whole of a run that an error ends, and raise the error with where that is and how to go on."""
    if isinstance(error, NotSaved):  # it says itself what is whole
        raise error
    left = _save_what_is_whole(parts, error)
    # What `clipo_ds.cli` tells in one line; anything else keeps its traceback, and gets a last line.
    if isinstance(error, FloatingPointError) or type(error).__module__ == types.__name__:
        raise type(error)(f"{error}; {left}") from error
    error.add_note(left)
    raise error


def save(parts: Parts) -> None:
    """Write a checkpoint of the last step done."""
    try:
        path = save_checkpoint(
            parts.run_dir, parts.progress, parts.policy, parts.tokenizer, parts.term, parts.ranks,
            keep=parts.config.checkpoint.keep, data=parts.data,
        )  # fmt: skip
    except Exception as error:
        error.came_from_saving = True  # type: ignore[attr-defined]
        raise
    logger.info("checkpoint %s", path)


def how_to_go_on(parts: Parts) -> str:
    """Where a run stopped, and the flag that goes on from there."""
    done = f"stopped after step {parts.progress.step} of {parts.config.steps}"
    return f"{done}; go on with --resume {_checkpoint_path(parts)}"


@contextlib.contextmanager
def stop_after_step(parts: Parts) -> Iterator[None]:
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


def _save_what_is_whole(parts: Parts, error: Exception) -> str:
    """Save the last whole step where it can be; says what is left of the run."""
    if parts.progress.step == 0:
        return "no step was finished"
    alike = _is_alike(error)
    if _seen(lambda: (_checkpoint_path(parts) / "checkpoint.json").is_file(), alike):
        return how_to_go_on(parts)
    if getattr(error, "came_from_saving", False):  # it would again
        why = "saving it failed"
    else:
        why = _why_not(parts) if alike else "one rank failed alone, and saving takes them all"
    if why is None:
        try:
            save(parts)
            return how_to_go_on(parts)
        except Exception as second:  # of a disk, or of the device that the error has left unusable
            why = f"saving it failed ({' '.join(f'{type(second).__name__}: {second}'.split())})"
            alike = _is_alike(second)
    newest = _seen(lambda: newest_checkpoint(parts.run_dir), alike)
    rest = f"go on from an earlier one with --resume {newest}" if newest else "there is no earlier checkpoint"
    return f"step {parts.progress.step} of {parts.config.steps} is not saved: {why}; {rest}"


def _why_not(parts: Parts) -> str | None:
    """What speaks against saving the weights as they are; the same on all ranks."""
    if not parts.is_between_steps:
        return f"an optimiser step of step {parts.progress.step + 1} has changed its weights"
    finite = parts.policy.is_finite() and (parts.term is None or parts.term.is_finite())
    broken = distributed.max_over_ranks(float(not finite), parts.ranks.device)
    return "its weights are not finite" if broken else None


def _is_alike(error: Exception) -> bool:
    """Whether all ranks have this error at the same place, so that they can do something together."""
    return isinstance(error, ALIKE) or distributed.is_everywhere(error)


def _seen(look: Callable[[], T], alike: bool) -> T:
    """What a look at the disk gives: rank 0's where all ranks are here, since file systems of machines may disagree."""
    return distributed.from_main(look) if alike else look()


def _checkpoint_path(parts: Parts) -> Path:
    return folder_of(parts.run_dir, parts.progress.step)
