"""Where a run writes, what it goes on from, and what may be another way when it does.

A run that goes on has the settings in its folder's config.yaml; the command line may change those of `MAY_CHANGE`, and
everything else is refused by name, since a run whose first half had other settings is neither run. Layer L3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipo_ds.checkpoint import newest_checkpoint, require_checkpoint
from clipo_ds.config import load_config
from clipo_ds.fields import yaml_text
from clipo_ds.records import check_run_dir
from clipo_ds.schema import TrainConfig
from clipo_ds.types import InputError

MAY_CHANGE = (
    # where the run lies, and what describes it
    "run_dir", "resume", "recipe", "ds_config",
    # how long it goes, and what is seen and kept of it
    "steps", "evaluation", "data.test", "checkpoint", "logging",
    # how the same numbers are computed, up to rounding
    "model.gradient_checkpointing", "model.logprob_chunk_tokens", "model.attn_implementation",
    "model.trust_remote_code", "optimizer.max_tokens_per_micro_batch", "optimizer.share_prompts",
    "reward.verifier_workers",
    # where the same policy is sampled, say after a server died; another engine draws other random numbers
    "rollout.engine", "rollout.server", "rollout.vllm", "rollout.async_steps", "rollout.max_sequences",
    "rollout.sleep", "rollout.parity",
)  # fmt: skip


def run_folder(config: TrainConfig, fresh_name: str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to continue from.

    Args:
        config: `run_dir` and `resume` decide.
        fresh_name: Name below runs/ for a new run without `run_dir`; the same on all ranks.

    Raises:
        InputError: The folder or the checkpoint is not what `resume` says.
    """
    if config.resume is None:
        folder = Path("runs", fresh_name) if config.run_dir is None else Path(config.run_dir)
        check_run_dir(folder)
        return folder, None
    if config.resume == "auto":
        if config.run_dir is None:
            raise InputError("`run_dir` must name the run folder to continue with --resume auto, got nothing")
        folder = Path(config.run_dir)
        if not _holds_run(folder):
            check_run_dir(folder, resuming=True)
        return folder, newest_checkpoint(folder)
    found = Path(config.resume)
    require_checkpoint(found)
    owner = found.resolve().parent.parent
    if config.run_dir is not None and Path(config.run_dir).resolve() != owner:
        raise InputError(f"`run_dir` must be the folder of the checkpoint to resume ({owner}), got {config.run_dir!r}")
    if not _holds_run(owner):
        raise InputError(
            f"`resume` must be a checkpoint inside its run folder, got '{found}', and there is no config.yaml in "
            f"{owner}; to go on from its weights alone give --model.path {found / 'model'}"
        )
    return Path(config.run_dir or found.parent.parent), found


def check_settings(config: TrainConfig, run_dir: Path, checkpoint: Path | None) -> None:
    """Check that the run in a folder can go on with these settings; a folder without a run takes any.

    Raises:
        InputError: A setting that may not change is another than in the folder's config.yaml.
    """
    if not _holds_run(run_dir):
        return
    before = load_config(run_dir / "config.yaml")
    changed = [(name, *values) for name, *values in differences(before, config) if not _may_change(name)]
    if not changed:
        return
    listed = "; ".join(f"`{name}` must stay {_said(old)}, got {_said(new)}" for name, old, new in changed)
    start = (
        f"start a new run from --model.path {checkpoint}/model" if checkpoint else "start a new run in another folder"
    )
    raise InputError(f"{listed}: the run in {run_dir} goes on with its own settings; to change them, {start}")


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted field, value before and value now, of all that differs; a section switched on or off is one difference."""
    if before == now:
        return
    if not dataclasses.is_dataclass(before) or type(before) is not type(now):
        yield path, before, now
        return
    for entry in dataclasses.fields(before):
        inner = f"{path}.{entry.name}" if path else entry.name
        yield from differences(getattr(before, entry.name), getattr(now, entry.name), inner)


def _may_change(name: str) -> bool:
    return any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_CHANGE)


def _said(value: Any) -> str:
    return "on" if dataclasses.is_dataclass(value) else yaml_text(value)


def _holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()
