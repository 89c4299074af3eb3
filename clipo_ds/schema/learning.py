"""What is learnt from rollouts, and how: contrastive term, objective, optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clipo_ds.schema.base import require
from clipo_ds.schema.rewards import LARGEST_REWARD


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
        for name in ("weight", "bonus"):
            value = getattr(self, name)
            require(abs(value) <= LARGEST_REWARD, f"contrastive.{name}", f"at most {LARGEST_REWARD:g} in size", value)
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
    """Padded tokens in one forward pass on one rank. Where a rank's whole batch fits and is one optimiser step, the
    update goes on from the pass that scored it, and spares a forward pass."""
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
