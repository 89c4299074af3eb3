"""DeepSpeed's JSON files: what the recipe fills in, and what contradicts it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from clipo_ds.config import load_config, read_ds_config
from clipo_ds.schema import TrainConfig
from clipo_ds.types import InputError

DS_CONFIGS = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return load_config("demo", ["optimizer.learning_rate=3e-4", "optimizer.max_grad_norm=0.5"])


def write(folder: Path, content: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def leaves(value: Any) -> list[Any]:
    return [leaf for item in value.values() for leaf in leaves(item)] if isinstance(value, dict) else [value]


def test_the_four_promised_files_are_shipped() -> None:
    assert {"zero2", "zero3", "zero3_cpu", "zero3_offload"} <= {path.stem for path in DS_CONFIGS}


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_shipped_file_is_filled_and_accepted_by_deepspeed(path: Path, dtype: str, config: TrainConfig) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    model = dataclasses.replace(config.model, dtype=dtype)
    filled = read_ds_config(path, 1, dataclasses.replace(config, model=model))
    assert "auto" not in leaves(filled)
    parsed = DeepSpeedConfig(filled)
    assert parsed.zero_optimization_stage == filled["zero_optimization"]["stage"]
    assert parsed.bfloat16_config.enabled is (dtype == "bfloat16")
    assert parsed.gradient_clipping == 0.5
    assert parsed.optimizer_params["lr"] == 3e-4
    assert parsed.optimizer_name == "adamw"
    # A misspelt key would be carried along and change nothing.
    known = set(type(parsed.zero_config).model_fields) | {
        info.alias for info in type(parsed.zero_config).model_fields.values()
    }
    assert set(filled["zero_optimization"]) <= known


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_accumulate_gradients_in_float32(path: Path) -> None:
    # One window may hold hundreds of micro-batches, too many to add up in bfloat16.
    assert json.loads(path.read_text())["data_types"]["grad_accum_dtype"] == "fp32"


def test_an_empty_file_means_zero_stage_0_and_the_recipe(tmp_path: Path, config: TrainConfig) -> None:
    assert read_ds_config(write(tmp_path, {}), 2, config) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "weight_decay": 0.0}},
        "zero_optimization": {"stage": 0},
    }


def test_auto_inside_zero_optimization_is_left_to_deepspeed(tmp_path: Path, config: TrainConfig) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": False}})
    assert read_ds_config(path, 1, config)["zero_optimization"] == {"stage": 3, "overlap_comm": False}


def test_values_equal_to_the_recipe_and_keys_of_deepspeeds_own_pass(tmp_path: Path, config: TrainConfig) -> None:
    given = {
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False, "check_grad_overflow": True},
        "optimizer": {"type": "adamw", "params": {"lr": 0.0003, "betas": [0.9, 0.999], "eps": "auto"}},
        "zero_optimization": {"stage": 2},
        "wall_clock_breakdown": True,
    }
    filled = read_ds_config(write(tmp_path, given), 1, config)
    assert filled["wall_clock_breakdown"] is True
    assert filled["bf16"]["check_grad_overflow"] is True
    assert "eps" not in filled["optimizer"]["params"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1, column 2: not JSON"),
        ('{\n  "train_batch_size": 1,\n}', "line 3, column 1: not JSON"),
        ("[]", "must hold one JSON object"),
        ('{"bf16": {}, "bf16": {}}', "`bf16` must be given once"),
        ({"zero_optimization": {"stage": 4}}, "`zero_optimization.stage` must be one of 0, 1, 2, 3, got 4"),
        ({"zero_optimization": {"stage": "3"}}, '`zero_optimization.stage` must be one of 0, 1, 2, 3, got "3"'),
        ({"zero_optimization": {"stage": True}}, "`zero_optimization.stage` must be one of 0, 1, 2, 3, got true"),
        ({"zero_optimization": True}, "`zero_optimization` must be an object"),
        ({"optimizer": "AdamW"}, "`optimizer` must be an object"),
        (
            {"train_batch_size": 64},
            '`train_batch_size` must be "auto" or 1 (the trainer forms its own batches), got 64',
        ),
        ({"bf16": {"enabled": True}}, '`bf16.enabled` must be "auto" or false (model.dtype says it), got true'),
        ({"bf16": {"enabled": 0}}, '`bf16.enabled` must be "auto" or false'),
        ({"fp16": {"enabled": True}}, "`fp16.enabled` must be"),
        ({"gradient_clipping": 1.0}, '`gradient_clipping` must be "auto" or 0.5 (optimizer.max_grad_norm says it)'),
        ({"gradient_allreduce_op": "sum"}, "`gradient_allreduce_op` must be"),
        ({"managed_gradient_accumulation": False}, "`managed_gradient_accumulation` must be"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` must be left out"),
        ({"optimizer": {"params": {"lr": 1e-5}}}, "`optimizer.params.lr` must be"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "`optimizer.params.betas` must be"),
        ({"optimizer": {"type": "Lion"}}, '`optimizer.type` must be "AdamW", got "Lion"'),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, "`optimizer.params.adam_w_mode` must be true"),
    ],
)
def test_a_bad_file_ends_in_one_line(content: Any, message: str, tmp_path: Path, config: TrainConfig) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as raised:
        read_ds_config(path, 1, config)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_names_the_field(tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"`ds_config` must be an existing DeepSpeed JSON file, got .*zero9\.json"):
        read_ds_config(tmp_path / "zero9.json", 1, config)
    with pytest.raises(InputError, match="`ds_config` must be an existing"):
        read_ds_config(tmp_path, 1, config)
