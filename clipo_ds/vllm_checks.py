"""What keeps vLLM from sampling inside the ranks of a run, found before any weight is loaded.

Layer L2; vLLM itself is imported inside functions, since it is optional and takes seconds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from pathlib import Path
from typing import Literal

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clipo_ds import distributed
from clipo_ds.distributed import Ranks
from clipo_ds.schema import TrainConfig
from clipo_ds.types import InputError
from clipo_ds.vllm_engine import set_environment
from clipo_ds.vllm_room import GIB, VllmRoom, bytes_of_sequence, head_size, plan_room

logger = logging.getLogger(__name__)

HOW_TO_INSTALL = "`pip install vllm==0.32.0`, or `make setup` for a machine without a GPU"


def choose_engine(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The configuration with `rollout.engine` auto resolved, and said in one line; called by all ranks."""
    if config.rollout.engine != "auto":
        return config
    missing = None
    if ranks.device.type == "cpu":
        missing = "there is no GPU"
    # Several machines may differ in what is installed.
    elif not all(distributed.all_objects(_is_installed())):
        missing = f"vLLM is not installed, which is several times as fast ({HOW_TO_INSTALL})"
    if ranks.is_main:
        say = logger.info if missing is None or ranks.device.type == "cpu" else logger.warning
        say("rollout.engine auto: sampling with %s", "vLLM" if missing is None else f"transformers, since {missing}")
    engine: Literal["transformers", "vllm"] = "vllm" if missing is None else "transformers"
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine))


def check_vllm(config: TrainConfig, model: PreTrainedConfig, ranks: Ranks, longest_prompt: int) -> VllmRoom:
    """Check that vLLM can sample from a model as configured, without loading it; the room that its engine gets.

    Raises:
        InputError: vLLM is not installed or does not know the architecture or head size, the ranks do not make whole
            tensor-parallel groups, or the KV cache cannot hold one sequence.
    """
    _check_installed()
    _check_tensor_parallel(config, model, ranks)
    _check_adapter(config, model)
    room = plan_room(config, model, ranks, longest_prompt)
    _check_length(config, model, room, longest_prompt)
    _check_cache(config, model, room)
    _check_architecture(config, model)
    if ranks.device.type == "cpu":
        _check_head_size(config, model)
    return room


def _check_installed() -> None:
    if not _is_installed():
        raise InputError(
            "`rollout.engine` must be transformers or auto where vLLM is not installed, got 'vllm'; install it with "
            f"{HOW_TO_INSTALL}"
        )


def _is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _check_tensor_parallel(config: TrainConfig, model: PreTrainedConfig, ranks: Ranks) -> None:
    size, heads = config.rollout.vllm.tensor_parallel, model.get_text_config(decoder=True).num_attention_heads
    if ranks.world_size % size:
        raise InputError(
            f"`rollout.vllm.tensor_parallel` must divide the number of ranks ({ranks.world_size}), got {size}"
        )
    if size > 1 and ranks.device.type == "cpu":
        # vLLM 0.32 names the shared memory of a CPU group after "env://", which is no name that a system takes.
        raise InputError(f"`rollout.vllm.tensor_parallel` must be 1 on a CPU, got {size}")
    if heads % size:
        raise InputError(f"`rollout.vllm.tensor_parallel` must divide the model's {heads} attention heads, got {size}")


def _check_adapter(config: TrainConfig, model: PreTrainedConfig) -> None:
    if config.rollout.vllm.lora == "adapter" and _is_mixture(model):
        raise InputError(
            f"`rollout.vllm.lora` must be merged for a mixture of experts, got 'adapter' for {config.model.path!r}"
        )
    if config.rollout.vllm.lora == "adapter" and (Path(config.model.path) / "adapter_config.json").exists():
        raise InputError(
            f"`rollout.vllm.lora` must be merged for a model.path that is an adapter itself, got 'adapter' for "
            f"{config.model.path!r}"
        )


def _is_mixture(model: PreTrainedConfig) -> bool:
    text = model.get_text_config(decoder=True)
    return any(
        (getattr(text, name, None) or 0) > 1 for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )


def _check_length(config: TrainConfig, model: PreTrainedConfig, room: VllmRoom, longest_prompt: int) -> None:
    context, longest = room.max_model_len, longest_prompt + config.longest_response
    limit = getattr(model.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise InputError(f"`rollout.vllm.max_model_len` must be at most the model's context of {limit}, got {context}")
    if context < longest:
        raise InputError(
            f"`rollout.vllm.max_model_len` must be null or at least {longest} for a prompt of {longest_prompt} tokens "
            f"(training or test data) and {config.longest_response} new ones, got {context}"
        )


def _check_cache(config: TrainConfig, model: PreTrainedConfig, room: VllmRoom) -> None:
    needed = bytes_of_sequence(config, model, room.max_model_len)
    if room.kv_cache_bytes is not None and room.kv_cache_bytes < needed:
        raise InputError(
            f"`rollout.vllm.kv_cache_gb` must be at least {math.ceil(needed / GIB * 1000) / 1000:g} for one sequence "
            f"of {room.max_model_len} tokens (rollout.vllm.max_model_len), got {room.kv_cache_bytes / GIB:.3g}"
        )


def _check_architecture(config: TrainConfig, model: PreTrainedConfig) -> None:
    set_environment()
    from vllm import ModelRegistry

    # A configuration that was never saved names no architecture.
    names = model.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model.model_type, model.model_type)]
    if not set(names) & set(ModelRegistry.get_supported_archs()):
        raise InputError(
            f"`rollout.engine` must be transformers for a model that vLLM does not know, got 'vllm' for "
            f"{config.model.path!r}, a {' or '.join(names)}"
        )


def _check_head_size(config: TrainConfig, model: PreTrainedConfig) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if head_size(model) not in sizes:
        raise InputError(
            f"`rollout.engine` must be transformers for this model on a CPU, got 'vllm', whose CPU attention wants "
            f"heads of size {', '.join(map(str, sizes))}, and {config.model.path!r} has {head_size(model)}"
        )
