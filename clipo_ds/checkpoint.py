"""Checkpoints: written beside, renamed when whole; found, checked and resumed from.

    checkpoints/step_000100/
        model/             plain Hugging Face folder (full policy) or PEFT adapter, with the tokenizer
        engine/            DeepSpeed's own: partitioned master weights, optimiser, schedule
        head.safetensors   the contrastive head, when there is one
        trainer.pt         step, data position, head optimiser
        rng_rank_0.pt …    every random generator of each rank
        checkpoint.json    written last: step, world size, ZeRO stage, and what the data were (clipo_ds.data_digest)

`model/` makes a checkpoint usable without DeepSpeed and on any number of ranks; `engine/` makes the resumed run equal
to the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from clipo_ds import disk, distributed
from clipo_ds.contrastive_term import ContrastiveTerm
from clipo_ds.distributed import Ranks
from clipo_ds.policy import Policy
from clipo_ds.types import InputError, NotSaved
from clipo_ds.weight_sync import iterate_adapter, iterate_original_weights

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What Python, torch and safetensors raise where a disk takes no more."""
TORCH_CANNOT_WRITE = re.compile("inline_container|PytorchStreamWriter|iostream")
"""Names of torch's C++ in the RuntimeError of a file that it could not write."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int  # steps done
    prompts_drawn: int  # position in the order of the training prompts


def save_checkpoint(
    run_dir: Path,
    progress: Progress,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    term: ContrastiveTerm | None,
    ranks: Ranks,
    *,
    keep: int | None,
    data: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of `progress.step`; called by all ranks. Older ones beyond `keep` are removed afterwards.

    Args:
        data: What the prompts were, for `clipo_ds.resuming.check_data`.

    Raises:
        NotSaved: On all ranks, where the disk has no room, or does not take a file of one of them. What was written of
            the checkpoint is removed; older ones are as they were.
    """
    final = folder_of(run_dir, progress.step)
    partial = final.with_name(f".{final.name}.partial")
    takes = distributed.from_main(lambda: _room_for(run_dir, progress.step, policy))
    facts = {
        "step": progress.step,
        "world_size": ranks.world_size,
        "zero_stage": policy.engine.zero_optimization_stage(),
        "data": data,
    }
    try:
        with _written_by_all(run_dir, takes):
            if ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "engine" / "state").mkdir(parents=True)
        with _written_by_all(run_dir, takes):
            _save_engine(partial / "engine", policy)
        with _written_by_all(run_dir, takes):
            save_model(partial / "model", policy, tokenizer, ranks)  # its collectives come before its first write
            torch.save(random_state(), partial / f"rng_rank_{ranks.rank}.pt")
            if ranks.is_main:
                _save_position(partial, progress, term)
        with _written_by_all(run_dir, takes):  # the others have written by now
            if ranks.is_main:
                (partial / "checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n")
                if final.exists():
                    _remove(final)
                os.rename(partial, final)
                _remove_old(final.parent, keep)
    except NotSaved:
        if ranks.is_main:  # half a checkpoint would take the room that is wanted
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _save_position(folder: Path, progress: Progress, term: ContrastiveTerm | None) -> None:
    state: dict[str, Any] = {"prompts_drawn": progress.prompts_drawn, "head_optimizer": None}
    if term is not None:
        save_file({k: v.contiguous().cpu() for k, v in term.head.state_dict().items()}, folder / "head.safetensors")
        state["head_optimizer"] = None if term.optimizer is None else term.optimizer.state_dict()
    torch.save(state, folder / "trainer.pt")


def _save_engine(folder: Path, policy: Policy) -> None:
    """DeepSpeed's own part. A rank that cannot write its files goes through the collectives to the end nevertheless."""
    engine = policy.engine
    failures: list[Exception] = []
    save = engine.checkpoint_engine.save

    def noting(state_dict: Any, path: str) -> None:
        try:
            save(state_dict, path)
        except WRITE_ERRORS as error:
            failures.append(_Unwritten(path, _reason(error)))

    engine.checkpoint_engine.save = noting
    try:
        engine.save_checkpoint(
            str(folder), tag="state", exclude_frozen_parameters=isinstance(policy.model, PeftModel), save_latest=False
        )
    except OSError as error:  # of the scripts that rank 0 puts beside, just before the barrier at the end
        distributed.barrier()
        failures.append(error)
    finally:
        engine.checkpoint_engine.save = save
    if failures:
        raise failures[0]


class _Unwritten(Exception):
    """File and reason, of a library that names no file."""


def _reason(error: Exception) -> str:
    """Why a file was not written; an error that is not about writing is raised again."""
    if isinstance(error, RuntimeError) and not TORCH_CANNOT_WRITE.search(str(error)):
        raise error
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _written_by_all(run_dir: Path, takes: int) -> Iterator[None]:
    """Let every rank write in the block, and wait for all.

    Raises:
        NotSaved: On all ranks, where one of them could not.
    """
    failure: NotSaved | None = None
    try:
        yield
    except (_Unwritten, *WRITE_ERRORS) as error:
        free = disk.free_bytes(run_dir)
        named = isinstance(error, _Unwritten)
        file, reason = error.args if named else (getattr(error, "filename", None) or run_dir, _reason(error))
        if free < takes:  # rather than where in its C++ torch noticed it
            reason = "no room left"
        # Of what torch raises the number is not known.
        mended = "make room, then go on" if getattr(error, "errno", errno.ENOSPC) in disk.FULL else "go on"
        failure = NotSaved(
            f"'{file}' could not be written: {reason}; {_room(free, takes)}; {_what_is_whole(run_dir, mended)}"
        )
    distributed.raise_everywhere(failure)


@contextlib.contextmanager
def full_disk_in_words(run_dir: Path) -> Iterator[None]:
    """Turn what a disk that takes no more raises in the block, for any file of a run, into one line.

    Raises:
        NotSaved: In place of that `OSError`; all others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in disk.FULL:
            raise
        free, file = disk.in_words(disk.free_bytes(run_dir)), error.filename or run_dir
        left = "; ".join(getattr(error, "__notes__", ())) or _what_is_whole(run_dir)
        raise NotSaved(f"'{file}' could not be written: {error.strerror} ({free} free); {left}") from error


def _room_for(run_dir: Path, step: int, policy: Policy) -> int:
    """Bytes that the next checkpoint will take, about.

    Raises:
        NotSaved: There are fewer on the disk.
    """
    last = newest_checkpoint(run_dir)
    takes = _size_from_parameters(policy) if last is None else disk.size_of(last)
    free = disk.free_bytes(run_dir)
    if free < takes:
        raise NotSaved(
            f"'{folder_of(run_dir, step)}' was not written for want of room: {_room(free, takes)}; "
            f"{_what_is_whole(run_dir)}"
        )
    return takes


def _room(free: int, takes: int) -> str:
    return f"{disk.in_words(free)} free, and a checkpoint takes about {disk.in_words(takes)}"


def _size_from_parameters(policy: Policy) -> int:
    """Bytes of a checkpoint's tensors: master weights and both moments in float32, and the weights as they are."""
    takes = 0
    for parameter in policy.model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())  # the whole one's under ZeRO-3
        if parameter.requires_grad:
            copies = 1 if policy.engine.zero_optimization_stage() == 3 else 2
            takes += count * (12 + copies * parameter.element_size())
    return takes


def _what_is_whole(run_dir: Path, mended: str = "make room, then go on") -> str:
    """The end of a line about what was not written."""
    kept = newest_checkpoint(run_dir)
    whole = f"the checkpoint of step {step_of(kept)} is whole" if kept else "there is no whole checkpoint yet"
    return f"{whole}; {mended} with --resume auto --run_dir {run_dir}"


def save_model(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> None:
    """Write the policy as a folder that `from_pretrained` loads elsewhere; called by all ranks.

    A LoRA policy becomes a PEFT adapter, a full one a Hugging Face model in the policy's precision, with the names of
    the folder that it was published in.
    """
    model = policy.model
    adapter = isinstance(model, PeftModel)
    state: dict[str, torch.Tensor] = {}
    for name, weight in iterate_adapter(model) if adapter else iterate_original_weights(model, tied=False):
        if ranks.is_main:
            state[name] = weight.to("cpu", copy=True)
    if not ranks.is_main:
        return
    folder.mkdir(parents=True)
    if adapter:
        model.save_pretrained(str(folder), state_dict=state)
    else:
        save_torch_state_dict(state, folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step_"))


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    whole = [p.parent for p in (run_dir / "checkpoints").glob("step_*/checkpoint.json")]
    return max(whole, key=lambda path: path.name, default=None)


def require_checkpoint(checkpoint: Path) -> None:
    """Check that a folder is a checkpoint.

    Raises:
        InputError: It is none.
    """
    if not (checkpoint / "checkpoint.json").is_file():
        raise InputError(
            f"`resume` must be `auto` or a whole checkpoint folder (…/checkpoints/step_NNNNNN), got '{checkpoint}'"
        )


def check_resumable(checkpoint: Path, world_size: int, zero_stage: int, *, steps: int, with_term: bool) -> None:
    """Check that a run of this shape can continue from a checkpoint.

    Raises:
        InputError: It was written by another number of ranks or another ZeRO stage, or after more steps than the run
            is to have, or a file of it is missing.
    """
    require_checkpoint(checkpoint)
    facts = json.loads((checkpoint / "checkpoint.json").read_text())
    if facts["world_size"] != world_size:
        raise InputError(
            f"`resume` must be run on as many ranks as wrote the checkpoint ({facts['world_size']}), got {world_size}; "
            f"to go on from its weights alone give --model.path {checkpoint / 'model'}"
        )
    if facts["zero_stage"] != zero_stage:
        raise InputError(
            f"`ds_config` must have ZeRO stage {facts['zero_stage']} to resume {checkpoint.name}, got {zero_stage}"
        )
    if facts["step"] > steps:
        raise InputError(f"`steps` must be at least the {facts['step']} of {checkpoint}, got {steps}")
    for file in _files_of(world_size, zero_stage, with_term=with_term):
        if not any(checkpoint.glob(file)):
            raise InputError(f"`resume` must be a whole checkpoint, got '{checkpoint}' without {file}")


def _files_of(world_size: int, zero_stage: int, *, with_term: bool) -> Iterator[str]:
    """The files that `load_checkpoint` reads, as patterns; DeepSpeed puts the precision before some of its names."""
    yield "trainer.pt"
    if with_term:
        yield "head.safetensors"
    for rank in range(world_size):
        yield f"rng_rank_{rank}.pt"
        if zero_stage == 3:
            yield f"engine/state/*zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        if zero_stage > 0:
            yield f"engine/state/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    if zero_stage < 3:
        yield "engine/state/mp_rank_00_model_states.pt"


def load_checkpoint(checkpoint: Path, policy: Policy, term: ContrastiveTerm | None, ranks: Ranks) -> Progress:
    """Bring policy, optimiser, schedule, head and random generators back; all ranks call it after `check_resumable`."""
    state = torch.load(checkpoint / "trainer.pt", map_location=ranks.device, weights_only=True)
    policy.engine.load_checkpoint(str(checkpoint / "engine"), tag="state", load_module_strict=False)
    policy.renew_learning_rate()
    if term is not None:
        term.head.load_state_dict(load_file(checkpoint / "head.safetensors", device=str(ranks.device)))
        if term.optimizer is not None and state["head_optimizer"] is not None:
            term.optimizer.load_state_dict(state["head_optimizer"])
    # Written by this program on the same machine; numpy's and Python's states are no plain tensors.
    restore_random_state(torch.load(checkpoint / f"rng_rank_{ranks.rank}.pt", weights_only=False))
    facts = json.loads((checkpoint / "checkpoint.json").read_text())
    return Progress(step=int(facts["step"]), prompts_drawn=int(state["prompts_drawn"]))


def remove_left(run_dir: Path) -> None:
    """Remove what a process that was killed left of a checkpoint it was writing or removing."""
    for path in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_old(folder: Path, keep: int | None) -> None:
    if keep is not None:
        for path in sorted(folder.glob("step_*"))[:-keep]:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    # Out of sight first, so that no reader finds half a checkpoint.
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def random_state() -> dict[str, Any]:
    """Where this rank's global random generators stand."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Bring them back to what `random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
