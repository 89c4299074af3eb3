"""The policy: which model, in what precision, whole or through adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clipo_ds.schema.base import require


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 16
    """Rank of the LoRA factors."""
    alpha: float = 32.0
    """LoRA scale; the update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input, probability. Ratios of a policy with dropout are noisy: leave it at 0."""
    target_modules: str | list[str] = "all-linear"
    """Names of the modules that get an adapter, or `all-linear` for every linear layer but the output head."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "model.lora.rank", "at least 1", self.rank)
        require(self.alpha > 0, "model.lora.alpha", "positive", self.alpha)
        require(0 <= self.dropout < 1, "model.lora.dropout", "in [0, 1)", self.dropout)


@dataclass(frozen=True)
class ModelConfig:
    path: str = "arithmetic"
    """Model to train: a Hugging Face id, a local folder, `package:NAME` for a GGUF file inside an installed Python
    package, or `arithmetic` for the built-in small model that `task` describes. A task takes any model whose tokenizer
    has its characters; its fields on the small model and the warm start then say nothing."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the policy's forward and backward; master weights and optimiser state are float32."""
    dropout: Literal["none", "keep"] = "none"
    """Noise that the model's own configuration draws in training: dropout, layers left out, jitter of routers. `none`
    trains the policy that was sampled; `keep` draws another one in every update, whose ratios are clipped by chance.
    The dropout of adapters is a field of its own."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more arithmetic."""
    attn_implementation: str | None = None
    """Attention kernel handed to transformers (`sdpa`, `flash_attention_2`, `eager`); null lets it choose."""
    trust_remote_code: bool = False
    """Let transformers run model code that comes with the weights."""
    lora: LoraConfig | None = None
    """Train LoRA adapters instead of all weights; null trains the full model. Where `path` is a PEFT adapter, the run
    goes on with it (`rank`, `alpha` and `target_modules` must be its own), and with null it is merged into its base."""
    logprob_chunk_tokens: int = 1024
    """Response tokens whose vocabulary logits are held at once in `score`; bounds memory by chunk x vocabulary."""

    def __post_init__(self) -> None:
        require(self.path != "", "model.path", "a model id, a folder, package:NAME or arithmetic", self.path)
        require(self.logprob_chunk_tokens >= 1, "model.logprob_chunk_tokens", "at least 1", self.logprob_chunk_tokens)
