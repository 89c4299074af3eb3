"""Small models with random weights, which their folder names or cuts otherwise than transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from clipo_ds.warm_start import build_tokenizer

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"num_key_value_heads": 4},  # its output head has another name
    "deepseek_v3": {  # a router's correction bias is a buffer
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "hrm_text": {},  # gate and up, and what attention projects, are one weight each
}  # fmt: skip


def make_mixture(family: str, folder: Path, *, seed: int = 0) -> nn.Module:
    """Write the model as transformers writes it, and give it."""
    tokenizer = build_tokenizer()
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **{**common, **(EXPERTS | OTHERS)[family]})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for tensor in (*model.parameters(), *model.buffers()):  # far from uniform, so that a wrong weight shows
        if tensor.is_floating_point() and tensor.ndim > 1:
            nn.init.normal_(tensor, std=0.3)
    model.generation_config = transformers.GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """All that a model folder's weight files hold."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return weights
