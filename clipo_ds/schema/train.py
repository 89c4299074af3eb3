"""One run as a whole, and what concerns two sections at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from clipo_ds.schema.base import require
from clipo_ds.schema.data import DataConfig
from clipo_ds.schema.learning import ContrastiveConfig, ObjectiveConfig, OptimizerConfig
from clipo_ds.schema.model import ModelConfig
from clipo_ds.schema.rewards import RewardConfig
from clipo_ds.schema.rollout import RolloutConfig, SamplingConfig
from clipo_ds.schema.running import CheckpointConfig, EvaluationConfig, LoggingConfig
from clipo_ds.schema.task import TaskConfig

AUTO_IMPORTANCE_CAP = 2.0


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
    """The built-in arithmetic task, whose problems take the place of `data`; null trains on `data`."""
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
    anew. What the folder holds of later steps (checkpoints, metrics, rollouts, evaluations) is moved aside into its
    superseded/, and never deleted. Settings are those of the folder's config.yaml, and few of them may be given anew
    (README)."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "at least 1", self.steps)
        require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32", self.seed)
        builtin = self.model.path == "arithmetic"
        require(not builtin or self.task is not None, "task", "given when model.path is arithmetic", self.task)
        if self.task is None:
            require(bool(self.data.train), "data.train", "at least one file or dataset id", self.data.train)
        else:
            for name, given in (("data.train", self.data.train), ("data.test", self.data.test)):
                require(not given, name, "empty when a task is given, which has its own problems", given)
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
        adapter = self.rollout.engine in ("auto", "vllm") and self.rollout.vllm.lora == "adapter"
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
    def pooled_states_learn(self) -> bool:
        """Whether the contrastive loss reaches the policy through the pooled states."""
        return self.contrastive is not None and self.contrastive.policy_loss_weight > 0

    @property
    def importance_cap(self) -> float | None:
        """`objective.importance_cap` with `auto` resolved."""
        cap = self.objective.importance_cap
        if cap == "auto":
            return None if self.rollout.engine == "transformers" else AUTO_IMPORTANCE_CAP
        return cap
