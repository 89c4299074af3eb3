"""Where a run writes, what it goes on from, and what may be another way when it does.

A run that goes on has the settings in its folder's config.yaml; the command line may change those of `MAY_CHANGE`, and
everything else is refused by name, since a run whose first half had other settings is neither run. The same holds for
its training data. Layer L3.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipo_ds import distributed
from clipo_ds.checkpoint import newest_checkpoint, require_checkpoint
from clipo_ds.config import load_config
from clipo_ds.data_digest import difference
from clipo_ds.distributed import Ranks
from clipo_ds.fields import yaml_text
from clipo_ds.folder_lock import check_free
from clipo_ds.records import check_run_dir, check_writable
from clipo_ds.schema import TrainConfig
from clipo_ds.types import InputError

MAY_CHANGE = (
    # where the run lies, and what describes it
    "run_dir", "resume", "recipe", "ds_config",
    # how long it goes, and what is seen and kept of it
    "steps", "evaluation", "data.test", "data.allow_changed", "checkpoint", "logging",
    # how the same numbers are computed, up to rounding
    "model.gradient_checkpointing", "model.logprob_chunk_tokens", "model.attn_implementation",
    "model.trust_remote_code", "optimizer.max_tokens_per_micro_batch", "optimizer.share_prompts",
    "reward.verifier_workers",
    # where the same policy is sampled, say after a server died; another engine draws other random numbers
    "rollout.engine", "rollout.server", "rollout.vllm", "rollout.async_steps", "rollout.max_sequences",
    "rollout.sleep", "rollout.parity",
)  # fmt: skip


def find_run_folder(config: TrainConfig, fresh_name: str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to continue from, both checked; rank 0 looks for all.

    Args:
        config: `run_dir` and `resume` decide.
        fresh_name: Name below runs/ for a new run without `run_dir`.

    Raises:
        InputError: The folder or the checkpoint is not what `resume` says, another run is writing into it, or a
            setting may not change.
    """
    named = config.run_dir or (Path(config.resume).parent.parent if config.resume not in (None, "auto") else None)
    if named is not None:
        check_free(Path(named))
    folder, checkpoint = locate(config, fresh_name)
    check_settings(config, folder, checkpoint)
    return folder, checkpoint


def locate(config: TrainConfig, fresh_name: str) -> tuple[Path, Path | None]:
    """What `find_run_folder` gives, whoever has the folder.

    Raises:
        InputError: The folder or the checkpoint is not what `resume` says.
    """
    if config.resume is None:
        folder = Path("runs", fresh_name) if config.run_dir is None else Path(config.run_dir)
        if config.run_dir is None:
            check_writable(folder)  # where there is one of that name, the run will get another
        else:
            check_run_dir(folder)
        return folder, None
    if config.resume == "auto":
        if config.run_dir is None:
            raise InputError("`run_dir` must name the run folder to continue with --resume auto, got nothing")
        folder = Path(config.run_dir)
        if not holds_run(folder):
            check_run_dir(folder, resuming=True)
        return folder, newest_checkpoint(folder)
    found = Path(config.resume)
    require_checkpoint(found)
    owner = found.resolve().parent.parent
    if config.run_dir is not None and Path(config.run_dir).resolve() != owner:
        raise InputError(f"`run_dir` must be the folder of the checkpoint to resume ({owner}), got {config.run_dir!r}")
    if not holds_run(owner):
        raise InputError(
            f"`resume` must be a checkpoint inside its run folder, got '{found}', and there is no config.yaml in "
            f"{owner}; to go on from its weights alone give --model.path {found / 'model'}"
        )
    return Path(config.run_dir or found.parent.parent), found


def check_same_settings(config: TrainConfig, first: TrainConfig, ranks: Ranks) -> None:
    """Check that all ranks have the settings of the first; called by all ranks.

    They read their command line each, and what a run that goes on has on its disk.

    Raises:
        InputError: On all ranks, where one has others; only where files lie may differ between machines.
    """
    for name, theirs, own in differences(first, config):
        if name not in ("recipe", "ds_config", "run_dir", "resume"):
            wrong = f"`{name}` must be the same on all ranks, got {_said(theirs)} on rank 0 and {_said(own)} on rank "
            distributed.raise_everywhere(InputError(f"{wrong}{ranks.rank}"))
    distributed.raise_everywhere(None)


def check_settings(config: TrainConfig, run_dir: Path, checkpoint: Path | None) -> None:
    """Check that the run in a folder can go on with these settings; a folder without a run takes any.

    Raises:
        InputError: A setting that may not change is another than in the folder's config.yaml.
    """
    if not holds_run(run_dir):
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


def check_data(config: TrainConfig, checkpoint: Path | None, data: Mapping[str, Any]) -> list[str]:
    """Check that a run goes on with the training data that it had.

    Args:
        data: `digest_prompts` of the training prompts, under `train`, and of every test set by its name, under `test`.

    Returns what is to be said: training data that were let change, and test sets that are others under the same name.

    Raises:
        InputError: The training data are others, and `data.allow_changed` does not allow it.
    """
    if checkpoint is None:
        return []
    before = json.loads((checkpoint / "checkpoint.json").read_text()).get("data")
    if before is None and config.data.allow_changed:
        return [f"{checkpoint.name} does not say what its data were; going on with what there is (data.allow_changed)"]
    if before is None:
        raise InputError(
            f"`resume` must be a checkpoint that says what its data were, got '{checkpoint}', which an older version "
            "wrote; go on without that check by --data.allow_changed true"
        )
    said = []
    field = "data.train" if config.task is None else "task"
    changed = difference(before["train"], data["train"])
    if changed is not None and not config.data.allow_changed:
        files = f" in {', '.join(config.data.train)}" if config.data.train else ""
        raise InputError(
            f"`{field}` must hold the problems that {checkpoint.name} was trained on, in the same order, got others"
            f"{files}: {changed}; put them back, or go on with these by --data.allow_changed true"
        )
    if changed is not None:
        said.append(f"`{field}` has changed since {checkpoint.name}: {changed}; going on with it (data.allow_changed)")
    for name, now in data["test"].items():
        if name in before["test"] and (changed := difference(before["test"][name], now)) is not None:
            said.append(f"test set {name} has changed since {checkpoint.name}: {changed}; its scores do not compare")
    return said


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


def holds_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "config.yaml").is_file()
