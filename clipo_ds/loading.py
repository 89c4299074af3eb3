"""The data of a run, read once on every machine: one of its ranks reads, renders, tokenises and checks, the others map
what it wrote.

Which ranks share a machine is told by the host's name; a rank that cannot open what its reader wrote (say, in another
container of the same name) reads for itself. Files are removed as soon as all have opened them, so a run that is killed
later leaves none, and `remove_left_folders` finds those of one that was killed in between. Layer L3.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from clipo_ds import arithmetic, distributed
from clipo_ds.data import load_prompts
from clipo_ds.data_digest import digest_prompts
from clipo_ds.distributed import Ranks
from clipo_ds.prompt_store import StoredPrompts, write_prompts
from clipo_ds.schema import TrainConfig
from clipo_ds.shared_memory import places, shared_folder
from clipo_ds.sources import name_sources
from clipo_ds.types import InputError, Prompt

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """What a run trains on and is tested on."""

    prompts: Sequence[Prompt]
    tests: dict[str, Sequence[Prompt]]  # by name
    longest_prompt: int  # of all, in tokens
    digests: dict[str, Any]  # of the training prompts, `train`, and of every test set by its name, `test`


@dataclass(frozen=True)
class _Shared:
    """What the reader of a machine tells its other ranks."""

    folder: Path | None  # with a file for each set, in order; None where there is no room for them
    tests: tuple[str, ...]  # names of the sets after the first
    longest_prompt: int
    digests: dict[str, Any]


def on_every_rank(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do the same on every rank, and raise on all of them what it raises on one; `work` waits for no other rank.

    Raises:
        InputError: As `work` of the first failing rank, with the rank and its host.
        RuntimeError: Anything else that it raised, likewise.
    """
    where = "" if ranks.is_main else f" (on rank {ranks.rank}, {socket.gethostname()})"
    wrong: Exception | None = None
    done: list[T] = []
    try:
        done.append(work())
    except InputError as error:  # one rank may lack a file, have less memory, or not reach what another does
        wrong = InputError(f"{error}{where}")
    except Exception as error:  # a fault of this program: the others would wait for this rank
        if ranks.world_size == 1:
            raise
        wrong = RuntimeError(f"{type(error).__name__}: {error}{where}")
        wrong.__cause__ = error
    distributed.raise_everywhere(wrong)
    return done[0]


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Data:
    """Training prompts and test sets; called by all ranks.

    Raises:
        InputError: As `load_prompts`; they do not suit `rollout` and `data`; or machines have different data.
    """
    if ranks.world_size == 1:
        return _read(config, tokenizer)
    hosts = distributed.all_objects(socket.gethostname())
    reader = hosts.index(hosts[ranks.rank])
    with contextlib.ExitStack() as files:
        own: Data | None = None
        shared: _Shared | None = None
        if reader == ranks.rank:
            own, shared = on_every_rank(ranks, lambda: _read_and_share(config, tokenizer, files))
        else:
            on_every_rank(ranks, lambda: None)
        told = distributed.all_objects(shared)[reader]
        assert told is not None
        # Behind this all ranks have opened the files.
        data = on_every_rank(ranks, lambda: own or _open(told) or _read(config, tokenizer))
    everywhere = distributed.all_objects(data.digests)
    for other, digests in enumerate(everywhere):
        if digests != everywhere[0]:
            raise InputError(
                "`data.train` and `data.test` must hold the same on every machine, got other prompts on "
                f"{hosts[other]} (rank {other}) than on {hosts[0]} (rank 0)"
            )
    return data


def _read_and_share(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, files: contextlib.ExitStack
) -> tuple[Data, _Shared]:
    """The data, mapped from files in a folder that is removed with `files`; or as read, where no place has room."""
    data = _read(config, tokenizer)
    sets = [data.prompts, *data.tests.values()]
    for place in reversed(places()):  # the memory is for weights, and small in containers
        with contextlib.ExitStack() as when_failing:
            try:
                folder = when_failing.enter_context(shared_folder(place))
                for number, prompts in enumerate(sets):
                    write_prompts(folder / str(number), prompts)
                shared = _Shared(folder, tuple(data.tests), data.longest_prompt, data.digests)
                mapped = _open(shared)
            except OSError as error:
                logger.info("prompts do not go into %s (%s)", place, error)
                continue
            if mapped is not None:
                files.push(when_failing.pop_all())
                return mapped, shared
    return data, _Shared(None, tuple(data.tests), data.longest_prompt, data.digests)


def _open(shared: _Shared) -> Data | None:
    """What the reader wrote, or None where this rank does not see it."""
    if shared.folder is None:
        return None
    try:
        prompts, *tests = [StoredPrompts(shared.folder / str(number)) for number in range(1 + len(shared.tests))]
    except OSError:
        return None
    return Data(prompts, dict(zip(shared.tests, tests, strict=True)), shared.longest_prompt, shared.digests)


def _read(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    limit = config.evaluation.max_problems
    prompts: list[Prompt]
    tests: dict[str, list[Prompt]]
    if config.task is not None:
        prompts = arithmetic.train_prompts(config.task, tokenizer)
        tests = arithmetic.test_prompts(config.task, tokenizer)
    else:
        prompts = load_prompts(config.data.train, tokenizer, config.data, max_rows=config.data.max_rows).prompts
        tests = {
            name: load_prompts([source], tokenizer, config.data, max_rows=limit, field="data.test").prompts
            for name, source in name_sources(config.data.test).items()
        }
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest > config.data.max_prompt_tokens:
        raise InputError(
            f"`data.max_prompt_tokens` must be at least {longest} for this task, got {config.data.max_prompt_tokens}"
        )
    if len(prompts) < config.rollout.prompts_per_step:
        raise InputError(
            f"`rollout.prompts_per_step` must be at most the number of training prompts ({len(prompts)}), "
            f"got {config.rollout.prompts_per_step}"
        )
    tests = {name: test[:limit] for name, test in tests.items()}
    every = [prompt for some in (prompts, *tests.values()) for prompt in some]
    digests = {"train": digest_prompts(prompts), "test": {name: digest_prompts(test) for name, test in tests.items()}}
    return Data(prompts, dict(tests), max(len(prompt.token_ids) for prompt in every), digests)
