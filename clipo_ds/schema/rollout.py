"""How rollouts are made: sampling, engine, servers, vLLM, and the limits on the sampler's mismatch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from clipo_ds.schema.base import require


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0
    """Sampling temperature of training rollouts. Anything but 1 makes the sampler another policy than the trained
    one."""
    top_p: float = 1.0
    """Nucleus threshold of training rollouts; 1 is off. Filters bias the ratio."""
    top_k: int = 0
    """Keep the k likeliest tokens in training rollouts; 0 is off. Filters bias the ratio."""
    allow_biased: bool = False
    """Train although temperature, top_p or top_k make the ratio biased."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "sampling.temperature", "positive", self.temperature)
        require(0 < self.top_p <= 1, "sampling.top_p", "in (0, 1]", self.top_p)
        require(self.top_k >= 0, "sampling.top_k", "at least 0", self.top_k)
        plain = self.temperature == 1 and self.top_p == 1 and self.top_k == 0
        require(
            plain or self.allow_biased,
            "sampling",
            "temperature 1, top_p 1, top_k 0 for unbiased ratios (or set sampling.allow_biased true)",
            f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}",
        )


@dataclass(frozen=True)
class ServerConfig:
    """vLLM servers that a run samples from, each started by `scripts/serve.py` on devices of its own."""

    urls: list[str] = field(default_factory=list)
    """The servers, as `http://HOST:PORT`; every rank spreads its prompts over all of them."""
    request_timeout_s: float = 1800.0
    """Seconds that the responses to one prompt may take; a server that is later counts as dead."""
    sync_timeout_s: float = 300.0
    """Seconds that sending new weights to all servers may take; a server that is later counts as dead."""
    on_death: Literal["stop", "continue"] = "stop"
    """When a server dies: `stop` writes a checkpoint and ends the run, `continue` leaves the server out and gives its
    prompts to the others, and stops when none is left."""

    def __post_init__(self) -> None:
        for url in self.urls:
            plain = re.fullmatch(r"https?://[^/\s]+:\d+/?", url)
            require(plain is not None, "rollout.server.urls", "of the form http://HOST:PORT", url)
        require(len(set(self.urls)) == len(self.urls), "rollout.server.urls", "different servers", self.urls)
        for name in ("request_timeout_s", "sync_timeout_s"):
            require(getattr(self, name) > 0, f"rollout.server.{name}", "positive", getattr(self, name))


@dataclass(frozen=True)
class VllmConfig:
    """vLLM inside the ranks; read with `rollout.engine vllm` only."""

    memory_share: float = 0.3
    """Share of a GPU's memory that vLLM may take, weights and KV cache together; the rest is the training engine's. On
    a CPU the share of free memory that the caches of all its ranks may take."""
    kv_cache_gb: float | None = None
    """KV cache of one rank, GiB. Null on a GPU is what `memory_share` leaves beside the weights, null on a CPU is
    enough for all rollouts that a rank samples at once, within `memory_share`."""
    max_model_len: int | None = None
    """Longest prompt and response together, in tokens. Null is the longest prompt plus the larger max_new_tokens of
    rollout and evaluation."""
    eager: bool | None = None
    """Run layer by layer instead of compiled (and, on GPUs, captured in graphs): slower, but starts in seconds. Null is
    true on a CPU, false on a GPU."""
    tensor_parallel: int = 1
    """Consecutive ranks that hold one sampler together, each a slice of every layer."""
    lora: Literal["merged", "adapter"] = "merged"
    """How a LoRA policy reaches the sampler: `merged` into its weights, or as an `adapter` beside its base weights,
    which moves little but samples slower."""

    def __post_init__(self) -> None:
        require(0 < self.memory_share < 1, "rollout.vllm.memory_share", "in (0, 1)", self.memory_share)
        gib = self.kv_cache_gb
        require(gib is None or gib > 0, "rollout.vllm.kv_cache_gb", "null or positive", gib)
        length = self.max_model_len
        require(length is None or length >= 2, "rollout.vllm.max_model_len", "null or at least 2", length)
        require(self.tensor_parallel >= 1, "rollout.vllm.tensor_parallel", "at least 1", self.tensor_parallel)


@dataclass(frozen=True)
class ParityConfig:
    """How far the sampler's log-probabilities may be from the trainer's before the run stops.

    Both score the same tokens under the same weights, so what differs is rounding, or a fault. With
    `rollout.async_steps` the rollouts are older, and one a rank is scored anew after every sync."""

    mean_abs: float | Literal["auto"] | None = "auto"
    """Limit on the mean over a step's tokens of |trainer - sampler| log-probability, nats. Auto is 0.05 where policy or
    sampler is bfloat16, off otherwise; null is off."""
    p999_abs: float | Literal["auto"] | None = "auto"
    """Limit on the 99.9th percentile of the same (the second largest of fewer than 2,000 tokens, so that no single one
    decides), nats. Auto is 0.5 where policy or sampler is bfloat16, off otherwise; null is off."""
    max_abs: float | Literal["auto"] | None = "auto"
    """Limit on the largest of the same, nats. Auto is 1e-3 where policy and sampler are float32, off otherwise: of
    100,000 roundings to bfloat16 the largest passes any limit that would find a fault; null is off."""

    def __post_init__(self) -> None:
        for name in ("mean_abs", "p999_abs", "max_abs"):
            value = getattr(self, name)
            require(
                value in (None, "auto") or value > 0, f"rollout.parity.{name}", "null, auto or a positive number", value
            )


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["auto", "transformers", "vllm", "vllm_server"] = "transformers"
    """Sampler: `transformers` holds a replica of the policy on every rank and runs anywhere, `vllm` runs vLLM inside
    the ranks, `vllm_server` asks the vLLM servers of rollout.server. `auto` is `vllm` on GPUs where vLLM is installed,
    and otherwise `transformers`; what it was at a run's start stands in its config.yaml and stays when it is resumed.
    """
    prompts_per_step: int = 128
    """Prompts in one step, over all ranks."""
    group_size: int = 16
    """Rollouts a prompt."""
    max_new_tokens: int = 2048
    """Length cap of a response, in tokens; what reaches it counts as truncated."""
    stop: list[str] = field(default_factory=list)
    """Tokens or texts that end a response, beside those that tokenizer, generation config and chat template name. Of a
    text the tokens up to the one that completes it are trained on, and what comes before it is judged."""
    max_sequences: int = 256
    """Sequences that the sampler decodes at once on one rank."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the sampler's replica; `auto` is the policy's. Servers must have it."""
    sleep: bool | None = None
    """Give a GPU's memory back while the policy trains: vllm drops its KV cache and keeps its weights in the CPU's
    memory (sleep level 1), the replica of transformers moves to the CPU and back in every step. Null is true for vllm,
    false for transformers."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """The servers of rollout.engine vllm_server."""
    async_steps: int = 0
    """1 samples the next step's rollouts while this step trains, with the weights from before its update; the
    importance weights of objective.importance_cap correct for that; a resumed run samples the batch that was on its way
    again, and so differs from an uninterrupted one. 0 samples each step's with the newest weights."""
    parity: ParityConfig = field(default_factory=ParityConfig)
    """Limits on the mismatch of sampler and trainer."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """vLLM's settings, for `rollout.engine vllm`."""

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "group_size", "max_new_tokens", "max_sequences"):
            require(getattr(self, name) >= 1, f"rollout.{name}", "at least 1", getattr(self, name))
        require(all(self.stop), "rollout.stop", "tokens or texts that are not empty", self.stop)
        urls, served = self.server.urls, self.engine == "vllm_server"
        require(not served or bool(urls), "rollout.server.urls", "at least one server for vllm_server", urls)
        require(served or not urls, "rollout.engine", "vllm_server when rollout.server.urls are given", self.engine)
        require(self.async_steps in (0, 1), "rollout.async_steps", "0 or 1", self.async_steps)
        require(
            served or self.async_steps == 0,
            "rollout.async_steps",
            "0 unless rollout.engine is vllm_server, which samples beside the training",
            self.async_steps,
        )
