"""What is seen and kept of a run: evaluation, checkpoints, logging."""

from __future__ import annotations

from dataclasses import dataclass, field

from clipo_ds.schema.base import require


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
    """Steps between checkpoints; one more is written at the end, and one of the last whole step before anything stops
    the run. Null writes these only."""
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
    """Trackers that accelerate knows (`tensorboard`, `wandb`, `trackio`, …), fed with the same metrics. A run that is
    resumed goes on in the same run of W&B and trackio."""
    project: str = "clipo_ds"
    """Project name that the trackers get."""

    def __post_init__(self) -> None:
        require(
            self.show_every is None or self.show_every >= 1, "logging.show_every", "null or at least 1", self.show_every
        )
        require(self.num_shown >= 1, "logging.num_shown", "at least 1", self.num_shown)
