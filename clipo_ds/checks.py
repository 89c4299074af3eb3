"""What PEFT, transformers and DeepSpeed would refuse only after weights were loaded, asked before.

The model is built without memory (on torch's meta device) and given its adapters there. Layer L2.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from clipo_ds.config import nearest
from clipo_ds.models import CONVERSION, ModelFacts, moved_base
from clipo_ds.policy import peft_config
from clipo_ds.schema import LoraConfig, ModelConfig
from clipo_ds.types import InputError

logger = logging.getLogger(__name__)

# Settings of a PEFT adapter that neither the trainer's merging nor `model.lora` know.
BEYOND_PLAIN_LORA = (
    "use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_bias",
    "trainable_token_indices", "target_parameters", "fan_in_fan_out",
)  # fmt: skip
# Keys of DeepSpeed's file that a misspelling, which DeepSpeed passes over in silence, is taken for.
DS_KEYS = (
    "zero_optimization", "optimizer", "bf16", "fp16", "data_types", "gradient_clipping", "train_batch_size",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "gradient_allreduce_op", "activation_checkpointing", "aio", "steps_per_print",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor",
    "torch_autocast", "compile", "checkpoint", "data_efficiency", "sparse_gradients",
    "seq_parallel_communication_data_type", "managed_gradient_accumulation", "compression_training", "elasticity",
    "autotuning", "hybrid_engine", "nebula", "pipeline", "tensor_parallel", "curriculum_learning", "eigenvalue",
    "progressive_layer_drop",
)  # fmt: skip


def check_model(model: ModelConfig, facts: ModelFacts) -> None:
    """Check gradient checkpointing, the attention kernel and the LoRA adapters against a model.

    Raises:
        InputError: transformers cannot checkpoint it or has no such kernel for it, or PEFT or the trainer cannot make
            these adapters.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(facts.config), None)
    if model.gradient_checkpointing and kind is not None and not kind.supports_gradient_checkpointing:
        raise InputError(
            f"`model.gradient_checkpointing` must be false for a {facts.config.model_type} model, which transformers "
            f"cannot checkpoint, got true for {model.path!r}"
        )
    if model.attn_implementation is not None:
        _without_weights(model, facts)
    if model.lora is None:
        return
    own = _adapted(model, facts, peft_config(model.lora))
    _say_left_alone(model, facts, own)
    if isinstance(model.lora.target_modules, list):
        for name in model.lora.target_modules:
            if not any(module == name or module.endswith(f".{name}") for module in own):
                raise _wrong_targets(f"names of modules, got {name!r}, which is none of {model.path}")
    if facts.adapter is not None:
        _check_adapter(model, model.lora, facts, facts.adapter, own)


def check_ds_config(path: str | Path, ds_config: Mapping[str, Any]) -> None:
    """Let DeepSpeed read its configuration.

    Raises:
        InputError: It refuses it, or a key on top looks like one of DeepSpeed's, misspelt.
    """
    for key in ds_config:
        near = nearest(key, DS_KEYS)
        if key not in DS_KEYS and near is not None:
            raise InputError(f"{path}: `{key}` is not a key of DeepSpeed's; did you mean `{near}`?")
    try:
        DeepSpeedConfig(dict(ds_config))
    except ValidationError as error:
        raise InputError(f"{path}: {_told(error, ds_config)}") from error
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        raise InputError(f"{path}: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from error


def _told(error: ValidationError, ds_config: Mapping[str, Any]) -> str:
    """The first complaint of pydantic in the words of this package."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    top = str(first["loc"][0]) if first["loc"] else ""
    section = next((name for name, value in ds_config.items() if isinstance(value, Mapping) and top in value), "")
    full = f"{section}.{key}" if section else key
    if first["type"] != "extra_forbidden":
        return f"`{full}`: {first['msg']}, got {first['input']!r}"
    fields = DeepSpeedZeroConfig.model_fields if section == "zero_optimization" else {}
    near = nearest(key, [field.alias or name for name, field in fields.items()])
    return f"`{full}` is not a key of DeepSpeed's" + (f"; did you mean `{section}.{near}`?" if near else "")


def _without_weights(model: ModelConfig, facts: ModelFacts) -> PreTrainedModel:
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(facts.config, **options)
    except (ValueError, ImportError) as error:
        if model.attn_implementation is None:
            raise
        raise InputError(
            f"`model.attn_implementation` must be null or a kernel that transformers has here for {model.path}, got "
            f"{model.attn_implementation!r}: {' '.join(str(error).split())[:200]}"
        ) from error


def _adapted(model: ModelConfig, facts: ModelFacts, lora: PeftLoraConfig) -> set[str]:
    """Names of the modules that would get an adapter."""
    plain = _without_weights(model, facts)
    modules, head = dict(plain.named_modules()), plain.get_output_embeddings()
    try:
        with warnings.catch_warnings(action="ignore"):  # whatever PEFT doubts is an error below, or said by the run
            names = set(get_peft_model(plain, lora).base_model.targeted_module_names)
    except ValueError as error:
        raise _wrong_targets(
            f"`all-linear` or names of linear modules, got {lora.target_modules!r}: {' '.join(str(error).split())}"
        ) from error
    for name in sorted(names):
        if not isinstance(modules[name], nn.Linear):
            raise _wrong_targets(f"names of linear modules, got {name!r}, which is of {type(modules[name]).__name__}")
        if modules[name] is head:
            raise _wrong_targets(f"names of modules other than the output head, got {name!r}")
    return names


def _say_left_alone(model: ModelConfig, facts: ModelFacts, own: set[str]) -> None:
    """Say what is adapted where a mixture's experts, most of the model, are not: they are no linear layers."""
    sizes = {name: weight.numel() for name, weight in _without_weights(model, facts).named_parameters()}
    experts = {name: size for name, size in sizes.items() if ".experts." in name and name.rpartition(".")[0] not in own}
    if experts:
        logger.warning(
            "model.lora adapts %s alone; the experts, %.0f%% of the weights, stay as they are",
            ", ".join(sorted({name.rpartition(".")[2] for name in own})),
            100 * sum(experts.values()) / sum(sizes.values()),
        )


def _check_adapter(
    model: ModelConfig, lora: LoraConfig, facts: ModelFacts, adapter: Mapping[str, Any], own: set[str]
) -> None:
    """Check that a run can go on with the adapter that `model.path` is."""
    way_out = "or model.lora null, which merges it into its base"
    beyond = next((name for name in BEYOND_PLAIN_LORA if adapter.get(name)), None)
    if adapter.get("peft_type") != "LORA" or adapter.get("bias", "none") != "none" or beyond is not None:
        what = (
            f"{beyond} {adapter[beyond]!r}" if beyond else f"{adapter.get('peft_type')}, bias {adapter.get('bias')!r}"
        )
        raise InputError(f"`model.path` must be a plain LoRA adapter to go on with it, {way_out}; got one with {what}")
    if (start := moved_base(adapter)) is not None:
        raise InputError(
            f"`model.path` must be an adapter that left its base alone to go on with it, {way_out}; got {model.path!r} "
            f"with init_lora_weights {start!r}: {CONVERSION}"
        )
    for name, wanted, given in (
        ("rank", adapter.get("r"), lora.rank),
        ("alpha", adapter.get("lora_alpha"), lora.alpha),
    ):
        if wanted != given:
            raise InputError(
                f"`model.lora.{name}` must be {wanted}, as in the adapter {model.path}, {way_out}; got {given}"
            )
    targets = adapter.get("target_modules")
    theirs = _adapted(
        model, facts, PeftLoraConfig(target_modules=targets, exclude_modules=adapter.get("exclude_modules"))
    )
    if own != theirs:
        raise _wrong_targets(f"{targets}, as in the adapter {model.path}, {way_out}; got {lora.target_modules!r}")


def _wrong_targets(rule: str) -> InputError:
    return InputError(f"`model.lora.target_modules` must be {rule}")
