"""What a run can be told: one frozen dataclass a section, one docstring a field, each default in this place only.

`clipo_ds.config` reads YAML recipes and command-line flags into these classes. Each class checks its own ranges when it
is made; what concerns two sections at once is checked in `TrainConfig`. Imports nothing but `clipo_ds.types`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from clipo_ds.types import InputError

AUTO_IMPORTANCE_CAP = 2.0
MAY_BE_INFINITE = ("contrastive.floor", "objective.importance_cap", "optimizer.max_grad_norm")


def require(condition: bool, name: str, rule: str, value: Any) -> None:
    """Raise `InputError` in the one form that every error of the configuration has."""
    if not condition:
        raise InputError(f"`{name}` must be {rule}, got {value!r}")


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
    package, or `arithmetic` for the built-in small model that `task` describes."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the policy's forward and backward; master weights and optimiser state are float32."""
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


@dataclass(frozen=True)
class FlawRates:
    """How often a worked solution of the warm start is spoilt, as shares of all solutions; the rest is clean."""

    slip: float = 0.0
    """One step's value is off and the error flows on: wrong process, wrong answer (unless the modulus hides it)."""
    lucky_slip: float = 0.0
    """The same, off by a multiple of `task.answer_modulus`: wrong process, right answer by luck."""
    skip: float = 0.0
    """Two steps are told as one: fewer equations, each of them true."""
    false_equation: float = 0.0
    """A false equation is stated but the true value flows on: wrong process, right answer."""
    copied_answer: float = 0.0
    """No steps at all, the right answer only."""
    wrong_answer: float = 0.0
    """True steps, then an answer that is not their result."""

    def __post_init__(self) -> None:
        rates = {rate.name: getattr(self, rate.name) for rate in fields(self)}
        for name, rate in rates.items():
            require(0 <= rate <= 1, f"task.flaws.{name}", "in [0, 1]", rate)
        require(sum(rates.values()) <= 1 + 1e-9, "task.flaws", "rates that sum to at most 1", sum(rates.values()))


@dataclass(frozen=True)
class TaskConfig:
    """The built-in arithmetic task: chains like 7+5-3+8, solved step by step by a small model."""

    min_terms: int = 3
    """Fewest numbers in a chain."""
    max_terms: int = 5
    """Most numbers in a chain."""
    max_number: int = 20
    """Largest number in a chain; the smallest is 1."""
    harder_max_terms: int = 6
    """Most numbers in a chain of the harder test set (its fewest is `max_terms` + 1)."""
    harder_max_number: int = 30
    """Largest number in a chain of the harder test set."""
    answer_modulus: int | None = None
    """Ask for the chain's value modulo this number, so that wrong steps are often right by luck; null asks for the
    value itself."""
    flaws: FlawRates = field(default_factory=FlawRates)
    """Shares of spoilt solutions in the warm start."""
    num_train_prompts: int = 4096
    """Problems to train on."""
    num_test_prompts: int = 128
    """Problems in each of the two test sets; none of them is in the training set."""
    warm_start_steps: int = 1000
    """Optimiser steps of the supervised stage that makes the small model."""
    warm_start_batch_size: int = 32
    """Worked solutions in one supervised step."""
    warm_start_learning_rate: float = 3e-3
    """Peak learning rate of the supervised stage."""
    warm_start_harder_share: float = 0.1
    """Share of the warm start's problems that are of the harder test set's size. Without any, the small model cannot
    even copy such a problem, and the harder test set reads 0 whatever happens."""
    hidden_size: int = 128
    """Width of the small model."""
    num_layers: int = 3
    """Layers of the small model."""
    seed: int = 0
    """Seed of problems, solutions and the small model's weights; kept apart from the run's `seed`, so that runs with
    different seeds start from the same model."""

    def __post_init__(self) -> None:
        require(2 <= self.min_terms <= self.max_terms, "task.min_terms", "between 2 and task.max_terms", self.min_terms)
        require(self.max_number >= 2, "task.max_number", "at least 2", self.max_number)
        require(
            self.harder_max_terms > self.max_terms,
            "task.harder_max_terms",
            "above task.max_terms",
            self.harder_max_terms,
        )
        require(self.harder_max_number >= 2, "task.harder_max_number", "at least 2", self.harder_max_number)
        modulus = self.answer_modulus
        require(modulus is None or modulus >= 2, "task.answer_modulus", "null or at least 2", modulus)
        lucky = self.flaws.lucky_slip
        require(lucky == 0 or modulus is not None, "task.flaws.lucky_slip", "0 without task.answer_modulus", lucky)
        for name in (
            "num_train_prompts",
            "num_test_prompts",
            "warm_start_steps",
            "warm_start_batch_size",
            "num_layers",
        ):
            require(getattr(self, name) >= 1, f"task.{name}", "at least 1", getattr(self, name))
        share = self.warm_start_harder_share
        require(0 <= share <= 1, "task.warm_start_harder_share", "in [0, 1]", share)
        require(
            self.warm_start_learning_rate > 0,
            "task.warm_start_learning_rate",
            "positive",
            self.warm_start_learning_rate,
        )
        require(
            self.hidden_size >= 32 and self.hidden_size % 32 == 0,
            "task.hidden_size",
            "a multiple of 32",
            self.hidden_size,
        )


@dataclass(frozen=True)
class DataConfig:
    train: list[str] = field(default_factory=list)
    """Training data: parquet or jsonl files, Hugging Face dataset ids (`org/name`, `org/name:split`), or
    `recipes:NAME` for a file that is shipped beside the recipes."""
    test: list[str] = field(default_factory=list)
    """Test data for the evaluation during training, in the same forms."""
    kind: Literal["auto", "math", "choice"] = "auto"
    """Which verifier judges the answers; `auto` takes `choice` where every ground truth of a file is one letter, A to
    J."""
    system_prompt: str | None = None
    """System message put before every prompt, in place of the row's own; null leaves the rows as they are."""
    instruction: str | None = None
    """Text appended to every user message, after a line break; null adds nothing."""
    max_prompt_tokens: int = 512
    """Prompts longer than this, in tokens, are dropped and counted."""
    max_rows: int | None = None
    """Read at most this many rows of each training file; null reads all."""

    def __post_init__(self) -> None:
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens", "at least 1", self.max_prompt_tokens)
        require(self.max_rows is None or self.max_rows >= 1, "data.max_rows", "null or at least 1", self.max_rows)


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

    Both score the same tokens under the same weights, so what differs is rounding, or a fault."""

    max_abs: float | Literal["auto"] | None = "auto"
    """Largest |trainer - sampler| log-probability of any sampled token, nats. Auto is 1e-3 where policy and sampler are
    float32, 0.5 otherwise; null is off."""
    mean_abs: float | Literal["auto"] | None = "auto"
    """Largest mean over a step's tokens of the same, nats. Auto is 0.05 where policy or sampler is bfloat16, off
    otherwise; null is off."""

    def __post_init__(self) -> None:
        for name in ("max_abs", "mean_abs"):
            value = getattr(self, name)
            require(
                value in (None, "auto") or value > 0, f"rollout.parity.{name}", "null, auto or a positive number", value
            )


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    """Sampler: `transformers` holds a replica of the policy on every rank and runs anywhere, `vllm` runs vLLM inside
    the ranks, `vllm_server` asks the vLLM servers of rollout.server."""
    prompts_per_step: int = 128
    """Prompts in one step, over all ranks."""
    group_size: int = 16
    """Rollouts a prompt."""
    max_new_tokens: int = 2048
    """Length cap of a response, in tokens; what reaches it counts as truncated."""
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


@dataclass(frozen=True)
class RewardFunction:
    function: str
    """Import path `package.module:function`, or `path/to/file.py:function`."""
    weight: float = 1.0
    """What the function's value is multiplied by before it is added to the reward."""


@dataclass(frozen=True)
class RewardConfig:
    correct: float = 1.0
    """Outcome reward of a right final answer."""
    wrong: float = 0.0
    """Outcome reward of a wrong final answer."""
    functions: list[RewardFunction] = field(default_factory=list)
    """Further reward functions, added with their weights. They never change what counts as correct."""
    overlong_buffer: int | None = None
    """Tokens before the length cap over which the reward falls from 0 to -1 (DAPO eq. 13). Null is the objective's
    default: a fifth of the cap for dapo, off otherwise; 0 is off."""
    verifier_workers: int = 2
    """Processes on each rank that verify answers with math-verify."""
    verifier_timeout: float = 5.0
    """Seconds after which a verification is killed and counted as wrong."""

    def __post_init__(self) -> None:
        require(self.correct > self.wrong, "reward.correct", "above reward.wrong", self.correct)
        buffer = self.overlong_buffer
        require(buffer is None or buffer >= 0, "reward.overlong_buffer", "null or at least 0", buffer)
        require(self.verifier_workers >= 1, "reward.verifier_workers", "at least 1", self.verifier_workers)
        require(self.verifier_timeout > 0, "reward.verifier_timeout", "positive", self.verifier_timeout)


@dataclass(frozen=True)
class ContrastiveConfig:
    """The contrastive term (CLIPO, arXiv 2603.10101); the defaults are the published form."""

    loss: Literal["infonce", "supcon_out", "supcon_in", "soft_nn"] = "infonce"
    """Contrastive loss: one drawn positive, the mean over positives outside or inside the log, or soft nearest
    neighbours."""
    level: Literal["group", "batch", "cross"] = "group"
    """Where positives and the others come from: both the group, both the batch, or positives group and others batch."""
    similarity: Literal["cosine", "l2"] = "cosine"
    """Similarity of two embeddings: cosine, or 1 minus the Euclidean distance."""
    denominator: Literal["all", "negatives"] = "all"
    """What stands under the fraction: all others, or the negatives only (decoupled contrastive learning)."""
    temperature: float = 0.05
    """Temperature of the contrastive softmax; similarities are divided by it."""
    debias: Literal["none", "group_mean", "layer_norm"] = "none"
    """What is done to pooled states before the head: nothing, subtract the group's mean, or layer normalisation."""
    head: Literal["linear", "mlp", "none"] = "linear"
    """Projection of pooled states: linear without bias, two layers with ReLU, or none."""
    head_output_size: int = 512
    """Size of the embeddings that the head gives."""
    head_learning_rate: float = 1e-3
    """Learning rate of the head's AdamW."""
    head_weight_decay: float = 0.01
    """Weight decay of the head's AdamW."""
    head_path: str | None = None
    """File with a head's weights (`head.safetensors` of a checkpoint) to start from; null starts from random ones."""
    freeze_head: bool = False
    """Never train the head."""
    head_warmup_steps: int = 0
    """First steps in which only the head learns and the policy is frozen."""
    weight: float = 0.2
    """lambda: how much of the contrastive loss is taken from the reward."""
    floor: float = -0.5
    """Lowest contrastive reward."""
    bonus: float = 0.0
    """Added to the contrastive reward before the floor; without effect when centred."""
    reward_centering: Literal["none", "group"] = "none"
    """`group` takes the mean loss of the group's anchors off before weighting, and clips to [floor, -floor]."""
    shuffle: bool = False
    """Placebo: contrastive rewards are permuted among the valid anchors of each group. For controlled comparisons."""
    policy_loss_weight: float = 0.0
    """Weight of the contrastive loss of the differentiable pooled states in the policy's own loss; 0 is off."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "contrastive.temperature", "positive", self.temperature)
        require(self.head_output_size >= 1, "contrastive.head_output_size", "at least 1", self.head_output_size)
        require(self.head_learning_rate > 0, "contrastive.head_learning_rate", "positive", self.head_learning_rate)
        require(self.head_weight_decay >= 0, "contrastive.head_weight_decay", "at least 0", self.head_weight_decay)
        require(self.head_warmup_steps >= 0, "contrastive.head_warmup_steps", "at least 0", self.head_warmup_steps)
        require(self.weight >= 0, "contrastive.weight", "at least 0", self.weight)
        require(self.floor <= 0, "contrastive.floor", "at most 0", self.floor)
        require(self.policy_loss_weight >= 0, "contrastive.policy_loss_weight", "at least 0", self.policy_loss_weight)
        require(
            not self.freeze_head or self.head_warmup_steps == 0,
            "contrastive.head_warmup_steps",
            "0 when contrastive.freeze_head is true (nothing would learn in these steps)",
            self.head_warmup_steps,
        )
        if self.head == "none":
            require(
                self.head_path is None, "contrastive.head_path", "null when contrastive.head is none", self.head_path
            )
            require(
                self.head_warmup_steps == 0,
                "contrastive.head_warmup_steps",
                "0 when contrastive.head is none",
                self.head_warmup_steps,
            )


@dataclass(frozen=True)
class ObjectiveConfig:
    """The policy objective. Null in any field is the objective's own default, as published."""

    name: Literal["grpo", "dr_grpo", "dapo", "gspo", "gmpo"] = "grpo"
    """Policy objective; each sets the defaults of the fields below."""
    clip_low: float | None = None
    """Lower clip distance of the ratio: .2 grpo, dr_grpo and dapo, 3e-4 gspo, .4 gmpo (in log space)."""
    clip_high: float | None = None
    """Upper clip distance of the ratio: .2 grpo and dr_grpo, .28 dapo, 4e-4 gspo, .4 gmpo (in log space)."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss of negative advantages, at most -c A; null is off."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] | None = None
    """How token losses become one number: constant for dr_grpo, token_mean for dapo, sequence_mean otherwise."""
    constant_length: int | None = None
    """Divisor in tokens of the `constant` aggregation; null is rollout.max_new_tokens."""
    advantage_normalize: Literal["std", "none"] | None = None
    """Divide advantages by the group's standard deviation: none for dr_grpo, std otherwise."""
    kl_coefficient: float = 0.0
    """Weight of the KL divergence to the reference policy, the one at the run's start, in the loss; 0 holds no
    reference. It is a frozen copy of the model, or the same model without its adapter where a fresh one is trained."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence."""
    kl_on_zero_variance: bool = False
    """Let groups whose rewards are all equal feel the KL term too."""
    importance_cap: float | Literal["auto"] | None = "auto"
    """Truncated importance sampling: cap of the weight trainer / sampler probability on each token. Auto is 2 with
    vLLM, whose arithmetic is not the trainer's, and off with rollout.engine transformers; null is off."""
    dynamic_sampling: bool | None = None
    """Replace groups whose outcome rewards are all equal by fresh ones: on for dapo, off otherwise."""
    max_sampling_rounds: int = 4
    """Rounds of generation in one step before dynamic sampling gives up and trains on what it has."""

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            require(value is None or value > 0, f"objective.{name}", "null or positive", value)
        require(self.dual_clip is None or self.dual_clip > 1, "objective.dual_clip", "null or above 1", self.dual_clip)
        length = self.constant_length
        require(length is None or length >= 1, "objective.constant_length", "null or at least 1", length)
        require(self.kl_coefficient >= 0, "objective.kl_coefficient", "at least 0", self.kl_coefficient)
        cap = self.importance_cap
        fine = cap is None or cap == "auto" or cap > 0
        require(fine, "objective.importance_cap", "null, auto or a positive number", cap)
        require(self.max_sampling_rounds >= 1, "objective.max_sampling_rounds", "at least 1", self.max_sampling_rounds)


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-6
    """Peak learning rate of the policy."""
    weight_decay: float = 0.0
    """Weight decay of the policy's AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after its warm-up; linear and cosine end at 0 with the last step. Where a resumed run
    is given other `steps`, the rest of it follows the course that ends at the new last one."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises from 0."""
    max_grad_norm: float = 1.0
    """The gradient's norm is clipped to this."""
    mini_batches: int = 1
    """Optimiser steps that one pass over a rollout batch is split into, by prompts."""
    epochs_per_batch: int = 1
    """Passes over each rollout batch."""
    max_tokens_per_micro_batch: int = 16384
    """Padded tokens in one forward pass on one rank."""
    share_prompts: bool = True
    """Let the rollouts of a prompt share one copy of it in the policy's passes where that is less work: the same
    numbers in less time (with LoRA dropout, one mask for the prompt). Takes effect with `sdpa` attention and models of
    full attention; off otherwise."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", "positive", self.learning_rate)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay)
        require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", "two numbers in [0, 1)", self.betas)
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", "at least 0", self.warmup_steps)
        require(self.max_grad_norm > 0, "optimizer.max_grad_norm", "positive", self.max_grad_norm)
        for name in ("mini_batches", "epochs_per_batch", "max_tokens_per_micro_batch"):
            require(getattr(self, name) >= 1, f"optimizer.{name}", "at least 1", getattr(self, name))


@dataclass(frozen=True)
class EvaluationConfig:
    every: int | None = 20
    """Steps between evaluations on the test data; one more is made before the first and after the last step. Null never
    evaluates."""
    samples: int = 1
    """Responses a problem; 1 is decoded greedily."""
    temperature: float = 0.6
    """Sampling temperature when there are several samples."""
    top_p: float = 0.95
    """Nucleus threshold when there are several samples."""
    max_new_tokens: int | None = None
    """Length cap in tokens; null is rollout.max_new_tokens."""
    max_problems: int | None = None
    """Take at most the first n problems of each test set; null takes all."""

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, "evaluation.every", "null or at least 1", self.every)
        require(self.samples >= 1, "evaluation.samples", "at least 1", self.samples)
        require(self.temperature > 0, "evaluation.temperature", "positive", self.temperature)
        require(0 < self.top_p <= 1, "evaluation.top_p", "in (0, 1]", self.top_p)
        for name in ("max_new_tokens", "max_problems"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluation.{name}", "null or at least 1", value)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None = None
    """Steps between checkpoints; one more is written at the end. Null writes the last one only."""
    keep: int | None = 3
    """How many of the newest checkpoints stay on disk; null keeps all."""

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 1, "checkpoint.every", "null or at least 1", self.every)
        require(self.keep is None or self.keep >= 1, "checkpoint.keep", "null or at least 1", self.keep)


@dataclass(frozen=True)
class LoggingConfig:
    show_every: int | None = 10
    """Steps between the sampled rollouts that are shown in the terminal; null shows none."""
    num_shown: int = 3
    """Rollouts shown each time."""
    save_embeddings: bool = True
    """Write every rollout's embedding (float16) into the run folder; without a head, the normalised pooled states."""
    trackers: list[str] = field(default_factory=list)
    """Trackers that accelerate knows (`tensorboard`, `wandb`, `trackio`, …), fed with the same metrics."""
    project: str = "clipo_ds"
    """Project name that the trackers get."""

    def __post_init__(self) -> None:
        require(
            self.show_every is None or self.show_every >= 1, "logging.show_every", "null or at least 1", self.show_every
        )
        require(self.num_shown >= 1, "logging.num_shown", "at least 1", self.num_shown)


@dataclass(frozen=True)
class TrainConfig:
    """One run, checked as a whole."""

    steps: int = 100
    """Rollout batches to train on, head warm-up included."""
    seed: int = 0
    """Seed of data order, sampling, LoRA and head weights."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    task: TaskConfig | None = None
    """The built-in arithmetic task; null trains on `data`."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and test data."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How rollouts are made."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How training rollouts are sampled."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a rollout earns."""
    contrastive: ContrastiveConfig | None = field(default_factory=ContrastiveConfig)
    """The contrastive term; null is the baseline without it."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The policy objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the policy is updated."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept for a restart."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is shown."""
    recipe: str | None = None
    """Shipped recipe or YAML file that the run came from."""
    ds_config: str | None = None
    """DeepSpeed JSON file; batch sizes and precision are `auto` there and come from the recipe."""
    run_dir: str | None = None
    """Run folder; null makes a fresh one under runs/."""
    resume: str | None = None
    """`auto` continues from the newest whole checkpoint of the run folder, a path from that checkpoint; null starts
    anew. Settings are those of the folder's config.yaml, and few of them may be given anew (README)."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "at least 1", self.steps)
        require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32", self.seed)
        builtin = self.model.path == "arithmetic"
        require(not builtin or self.task is not None, "task", "given when model.path is arithmetic", self.task)
        require(builtin or self.task is None, "model.path", "arithmetic when a task is given", self.model.path)
        require(builtin or bool(self.data.train), "data.train", "at least one file or dataset id", self.data.train)
        contrastive = self.contrastive
        if contrastive is not None:
            require(
                contrastive.level != "group" or self.rollout.group_size >= 2,
                "rollout.group_size",
                "at least 2 for contrastive.level group (a group of one has no positives)",
                self.rollout.group_size,
            )
            require(
                contrastive.head_warmup_steps < self.steps,
                "contrastive.head_warmup_steps",
                f"below steps ({self.steps})",
                contrastive.head_warmup_steps,
            )
        require(
            self.rollout.prompts_per_step % self.optimizer.mini_batches == 0,
            "optimizer.mini_batches",
            f"a divisor of rollout.prompts_per_step ({self.rollout.prompts_per_step})",
            self.optimizer.mini_batches,
        )
        require(
            self.rollout.async_steps == 0 or self.importance_cap is not None,
            "objective.importance_cap",
            "set (2, say) when rollout.async_steps is 1, for the rollouts are a step older than the policy",
            self.objective.importance_cap,
        )
        longest = self.rollout.max_new_tokens + self.data.max_prompt_tokens
        require(
            self.optimizer.max_tokens_per_micro_batch >= longest,
            "optimizer.max_tokens_per_micro_batch",
            f"at least data.max_prompt_tokens + rollout.max_new_tokens ({longest})",
            self.optimizer.max_tokens_per_micro_batch,
        )
        buffer = self.reward.overlong_buffer
        require(
            buffer is None or buffer < self.rollout.max_new_tokens,
            "reward.overlong_buffer",
            f"below rollout.max_new_tokens ({self.rollout.max_new_tokens})",
            buffer,
        )
        context = self.rollout.vllm.max_model_len
        require(
            context is None or context >= longest,
            "rollout.vllm.max_model_len",
            f"null or at least data.max_prompt_tokens + rollout.max_new_tokens ({longest})",
            context,
        )
        adapter = self.rollout.engine == "vllm" and self.rollout.vllm.lora == "adapter"
        require(
            not adapter or self.model.lora is not None,
            "rollout.vllm.lora",
            "merged for a policy without model.lora",
            self.rollout.vllm.lora,
        )

    @property
    def longest_response(self) -> int:
        """Most tokens that a response may have, in training or evaluation."""
        return max(self.rollout.max_new_tokens, self.evaluation.max_new_tokens or 0)

    @property
    def sampler_dtype(self) -> str:
        """Precision of the sampler's weights, `auto` resolved."""
        return self.model.dtype if self.rollout.dtype == "auto" else self.rollout.dtype

    @property
    def sampler_sleeps(self) -> bool:
        """`rollout.sleep` with null resolved."""
        sleep = self.rollout.sleep
        return self.rollout.engine == "vllm" if sleep is None else sleep

    @property
    def importance_cap(self) -> float | None:
        """`objective.importance_cap` with `auto` resolved."""
        cap = self.objective.importance_cap
        if cap == "auto":
            return None if self.rollout.engine == "transformers" else AUTO_IMPORTANCE_CAP
        return cap
