"""DeepSpeed's JSON file, with what the recipe says filled in.

A user picks a ZeRO stage and offloading in the JSON; batch sizes, precision and the optimiser's numbers are said once,
in the recipe, and are `auto` (or absent) in the JSON. Another value there is refused instead of one of the two winning.
Keys that are not named here pass through to DeepSpeed, which judges them. Imports schema and types only, and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipo_ds.schema import TrainConfig
from clipo_ds.types import InputError

_STAGES = (0, 1, 2, 3)
# Not in the recipe, and fixed by how the trainer works: it closes accumulation windows itself and undoes a *mean* over
# ranks. Checked where the JSON names them, never added.
_FIXED = {
    "managed_gradient_accumulation": True,
    "gradient_allreduce_op": "mean",
    "fp16.enabled": False,
    "torch_autocast.enabled": False,
}


def read_ds_config(path: str | Path, world_size: int, config: TrainConfig) -> dict[str, Any]:
    """Read a DeepSpeed JSON file and fill in what the recipe says.

    Args:
        path: The JSON file.
        world_size: Number of ranks.
        config: The run's configuration.

    Returns:
        A dictionary for `deepspeed.initialize` with an explicit ZeRO stage and no `auto` in the keys that the recipe
        governs. Batch sizes are 1 a rank: the trainer packs micro-batches by tokens and tells DeepSpeed where an
        accumulation window ends. `auto` inside `zero_optimization` becomes DeepSpeed's own default.

    Raises:
        InputError: The file is missing or not JSON (with the line), names an unknown ZeRO stage or a scheduler, or
            contradicts the recipe.
    """
    ds_config = _read_json(Path(path))
    zero = ds_config.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InputError(f"{path}: `zero_optimization` must be an object with a `stage`, got {json.dumps(zero)}")
    if "scheduler" in ds_config:
        raise InputError(f"{path}: `scheduler` must be left out, the recipe's optimizer.schedule says it")
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]
    stage = zero.setdefault("stage", 0)
    if stage not in _STAGES or isinstance(stage, bool):
        raise InputError(f"{path}: `zero_optimization.stage` must be one of 0, 1, 2, 3, got {json.dumps(stage)}")
    for key, (value, field) in _from_recipe(config, world_size).items():
        _fill(ds_config, key, value, f"{field} says it" if field else "the trainer forms its own batches", path)
    for key, value in _FIXED.items():
        if _has(ds_config, key):
            _fill(ds_config, key, value, "the trainer relies on it", path)
    _check_optimizer(ds_config["optimizer"], path)
    return ds_config


def _from_recipe(config: TrainConfig, world_size: int) -> dict[str, tuple[Any, str]]:
    """JSON key to the value it must have and the recipe's field that says so."""
    optimizer = config.optimizer
    return {
        "train_micro_batch_size_per_gpu": (1, ""),
        "gradient_accumulation_steps": (1, ""),
        "train_batch_size": (world_size, ""),
        "gradient_clipping": (optimizer.max_grad_norm, "optimizer.max_grad_norm"),
        "bf16.enabled": (config.model.dtype == "bfloat16", "model.dtype"),
        "optimizer.params.lr": (optimizer.learning_rate, "optimizer.learning_rate"),
        "optimizer.params.betas": (list(optimizer.betas), "optimizer.betas"),
        "optimizer.params.weight_decay": (optimizer.weight_decay, "optimizer.weight_decay"),
    }


def _fill(ds_config: dict[str, Any], key: str, value: Any, reason: str, path: str | Path) -> None:
    """Set a dotted key that is absent or `auto`; refuse another value than the given one."""
    *parents, leaf = key.split(".")
    section = ds_config
    for depth, parent in enumerate(parents, start=1):
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise InputError(f"{path}: `{'.'.join(parents[:depth])}` must be an object, got {json.dumps(section)}")
    present = section.get(leaf, "auto")
    # JSON knows `true == 1` no more than YAML does.
    if present != "auto" and (present != value or isinstance(present, bool) != isinstance(value, bool)):
        raise InputError(f'{path}: `{key}` must be "auto" or {json.dumps(value)} ({reason}), got {json.dumps(present)}')
    section[leaf] = value


def _has(ds_config: Mapping[str, Any], key: str) -> bool:
    *parents, leaf = key.split(".")
    section: Any = ds_config
    for parent in parents:
        section = section.get(parent, {})
        if not isinstance(section, Mapping):
            return False
    return leaf in section


def _check_optimizer(optimizer: dict[str, Any], path: str | Path) -> None:
    kind = optimizer.setdefault("type", "AdamW")
    if str(kind).lower() not in ("adamw", "adam"):
        raise InputError(f'{path}: `optimizer.type` must be "AdamW", got {json.dumps(kind)}')
    params = optimizer["params"]
    if params.get("adam_w_mode", True) is not True:
        raise InputError(f"{path}: `optimizer.params.adam_w_mode` must be true (weight decay is AdamW's), got false")
    if params.get("eps") == "auto":
        del params["eps"]


def _read_json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise InputError(f"{path}: `{doubled[0]}` must be given once, got it twice")
        return dict(pairs)

    if not path.is_file():
        raise InputError(f"`ds_config` must be an existing DeepSpeed JSON file, got '{path}'")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: `ds_config` must hold one JSON object, got {json.dumps(loaded)[:60]}")
    return loaded
