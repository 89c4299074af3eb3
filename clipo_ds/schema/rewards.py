"""What a rollout earns, and who verifies its answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from clipo_ds.schema.base import require

LARGEST_REWARD = 1e30  # in size: rewards are float32, and their sums and differences need room above


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
    """Further reward functions, added with their weights: plain ones, that return a list of numbers. They never change
    what counts as correct."""
    overlong_buffer: int | None = None
    """Tokens before the length cap over which the reward falls from 0 to -1 (DAPO eq. 13). Null is the objective's
    default: a fifth of the cap for dapo, off otherwise; 0 is off."""
    verifier_workers: int = 2
    """Processes on each rank that verify answers with math-verify."""
    verifier_timeout: float = 5.0
    """CPU seconds after which a verification is stopped. It is made once more, beside no other of its rank, and counts
    as wrong when it is stopped again; what else the machine does has no part in it. Such answers have status `timeout`
    in the records, and a warning names their problems."""

    def __post_init__(self) -> None:
        for name in ("correct", "wrong"):
            value = getattr(self, name)
            require(abs(value) <= LARGEST_REWARD, f"reward.{name}", f"at most {LARGEST_REWARD:g} in size", value)
        require(self.correct > self.wrong, "reward.correct", "above reward.wrong", self.correct)
        buffer = self.overlong_buffer
        require(buffer is None or buffer >= 0, "reward.overlong_buffer", "null or at least 0", buffer)
        require(self.verifier_workers >= 1, "reward.verifier_workers", "at least 1", self.verifier_workers)
        require(
            0 < self.verifier_timeout < math.inf,
            "reward.verifier_timeout",
            "positive and finite",
            self.verifier_timeout,
        )
