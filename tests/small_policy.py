"""A small model with random weights on a DeepSpeed engine of one rank, and batches for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from launching import ROOT

from clipo_ds.batching import collate
from clipo_ds.distributed import Ranks
from clipo_ds.policy import Policy, build_policy
from clipo_ds.schema import ModelConfig, OptimizerConfig
from clipo_ds.types import Batch, Prompt, Rollout

VOCABULARY = 61


def save_model(folder: Path) -> str:
    """Write the model; two layers, tied embeddings, grouped-query attention."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_policy(
    folder: str,
    ranks: Ranks,
    *,
    stage: int,
    optimizer: OptimizerConfig | None = None,
    eps: float = 1e-8,
    **model: object,
) -> Policy:
    """The small model's policy; `eps` is AdamW's."""
    config = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    config |= {
        "train_batch_size": ranks.world_size, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}, "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0, "eps": eps, "torch_adam": True}},
    }  # fmt: skip
    config.pop("data_types", None)
    settings = {"gradient_checkpointing": False, "logprob_chunk_tokens": 5} | model
    transformers.set_seed(0)
    return build_policy(
        folder, ModelConfig(path=folder, dtype="float32", **settings),
        optimizer or OptimizerConfig(learning_rate=1e-2), config,
        num_updates=10, with_reference=True, device=ranks.device,
    )  # fmt: skip


def make_flat(num_rows: int = 5, *, per_prompt: int = 1, seed: int = 1) -> list[tuple[Prompt, Rollout]]:
    """Random rollouts of unequal prompts and lengths, those of a prompt side by side; the last is one token long."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(0, VOCABULARY, (count,), generator=generator).tolist())

    flat = []
    for row in range(num_rows):
        if row % per_prompt == 0:
            prompt = Prompt(row, "p", tokens(1, 6), "1", "test")
        ids = tokens(2, 9) if row + 1 < num_rows else tokens(1, 2)
        flat.append((prompt, Rollout(ids, (0.0,) * len(ids), "r", False)))
    return flat


def make_batch(num_rows: int = 5, *, seed: int = 1) -> Batch:
    """`make_flat` as one micro-batch, every rollout with a prompt of its own."""
    return collate(make_flat(num_rows, seed=seed), [[row] for row in range(num_rows)], 0)
