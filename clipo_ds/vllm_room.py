"""How long a sequence the vLLM engine of a run has room for, and how large its KV cache is. Layer L2, no vLLM."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedConfig

from clipo_ds.distributed import Ranks
from clipo_ds.schema import TrainConfig

GIB = 1024**3
BLOCK_TOKENS = 128  # the CPU's KV cache is handed out in blocks of so many tokens


@dataclass(frozen=True)
class VllmRoom:
    """What one rank's engine is made for."""

    max_model_len: int  # tokens of prompt and response together
    kv_cache_bytes: int | None  # None where vLLM is to work it out from the share of a GPU's memory


def plan_room(config: TrainConfig, model: PreTrainedConfig, ranks: Ranks, longest_prompt: int) -> VllmRoom:
    """The room of a run's engine, from its fields and, on a CPU, from the memory that is free now."""
    longest = max(longest_prompt, config.data.max_prompt_tokens) + config.longest_response
    max_model_len = config.rollout.vllm.max_model_len or longest
    return VllmRoom(max_model_len, _kv_cache_bytes(config, model, ranks, max_model_len))


def bytes_of_sequence(config: TrainConfig, model: PreTrainedConfig, num_tokens: int) -> int:
    """Bytes of keys and values that one sequence takes in this rank's cache, in whole blocks."""
    text = model.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    own_heads = math.ceil(heads / config.rollout.vllm.tensor_parallel)
    size = torch.finfo(getattr(torch, config.sampler_dtype)).bits // 8
    per_token = text.num_hidden_layers * own_heads * head_size(model) * 2 * size
    return math.ceil(num_tokens / BLOCK_TOKENS) * BLOCK_TOKENS * per_token


def head_size(model: PreTrainedConfig) -> int:
    """Width of an attention head."""
    text = model.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _kv_cache_bytes(config: TrainConfig, model: PreTrainedConfig, ranks: Ranks, max_model_len: int) -> int | None:
    options = config.rollout.vllm
    if options.kv_cache_gb is not None:
        return int(options.kv_cache_gb * GIB)
    if ranks.device.type != "cpu":
        return None
    prompts = math.ceil(config.rollout.prompts_per_step / ranks.world_size) * options.tensor_parallel
    sequences = min(config.rollout.max_sequences, prompts * config.rollout.group_size)
    wanted = (sequences + 1) * bytes_of_sequence(config, model, max_model_len)  # vLLM keeps a block for itself
    beside = int(os.environ.get("LOCAL_SIZE", ranks.world_size))  # ranks on this machine
    return int(min(wanted, psutil.virtual_memory().available * options.memory_share / beside))
