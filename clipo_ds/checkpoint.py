"""Checkpoints: written beside, renamed when whole; found, checked and resumed from.

    checkpoints/step_000100/
        model/             plain Hugging Face folder (full policy) or PEFT adapter, with the tokenizer
        engine/            DeepSpeed's own: partitioned master weights, optimiser, schedule
        head.safetensors   the contrastive head, when there is one
        trainer.pt         step, data position, head optimiser
        rng_rank_0.pt …    every random generator of each rank
        checkpoint.json    written last: step, world size, ZeRO stage

`model/` makes a checkpoint usable without DeepSpeed and on any number of ranks; `engine/` makes the resumed run equal
to the uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from clipo_ds import distributed
from clipo_ds.contrastive_term import ContrastiveTerm
from clipo_ds.distributed import Ranks
from clipo_ds.policy import Policy
from clipo_ds.types import InputError
from clipo_ds.weight_sync import iterate_adapter, iterate_original_weights

logger = logging.getLogger(__name__)


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
) -> Path:
    """Write the checkpoint of `progress.step`; called by all ranks. Older ones beyond `keep` are removed afterwards."""
    final = run_dir / "checkpoints" / f"step_{progress.step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    policy.engine.save_checkpoint(
        str(partial / "engine"), tag="state", exclude_frozen_parameters=isinstance(policy.model, PeftModel)
    )
    save_model(partial / "model", policy, tokenizer, ranks)
    torch.save(_random_state(), partial / f"rng_rank_{ranks.rank}.pt")
    if ranks.is_main:
        state: dict[str, Any] = {"prompts_drawn": progress.prompts_drawn, "head_optimizer": None}
        if term is not None:
            save_file(
                {k: v.contiguous().cpu() for k, v in term.head.state_dict().items()}, partial / "head.safetensors"
            )
            state["head_optimizer"] = None if term.optimizer is None else term.optimizer.state_dict()
        torch.save(state, partial / "trainer.pt")
    distributed.barrier()
    if ranks.is_main:
        facts = {
            "step": progress.step,
            "world_size": ranks.world_size,
            "zero_stage": policy.engine.zero_optimization_stage(),
        }
        (partial / "checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _remove_old(final.parent, keep)
    distributed.barrier()
    return final


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
    _restore_random_state(torch.load(checkpoint / f"rng_rank_{ranks.rank}.pt", weights_only=False))
    facts = json.loads((checkpoint / "checkpoint.json").read_text())
    return Progress(step=int(facts["step"]), prompts_drawn=int(state["prompts_drawn"]))


def remove_later(checkpoint: Path) -> None:
    """Remove the checkpoints after one that a run goes on from: they belong to a course that is given up."""
    for path in checkpoint.parent.glob("step_*"):
        if path.name > checkpoint.name:
            _remove(path)


def _remove_old(folder: Path, keep: int | None) -> None:
    if keep is not None:
        for path in sorted(folder.glob("step_*"))[:-keep]:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    # Out of sight first, so that no reader finds half a checkpoint.
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
