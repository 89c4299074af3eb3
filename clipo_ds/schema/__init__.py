"""What a run can be told: one frozen dataclass a section, one docstring a field, each default in this place only.

`clipo_ds.config` reads YAML recipes and command-line flags into these classes. Each class checks its own ranges when it
is made; what concerns two sections at once is checked in `TrainConfig`. A file for each part of the configuration, all
their names importable from here. Imports nothing but `clipo_ds.types`.
"""

from __future__ import annotations

from clipo_ds.schema.base import MAY_BE_INFINITE, require
from clipo_ds.schema.data import DataConfig
from clipo_ds.schema.learning import ContrastiveConfig, ObjectiveConfig, OptimizerConfig
from clipo_ds.schema.model import LoraConfig, ModelConfig
from clipo_ds.schema.rewards import LARGEST_REWARD, RewardConfig, RewardFunction
from clipo_ds.schema.rollout import ParityConfig, RolloutConfig, SamplingConfig, ServerConfig, VllmConfig
from clipo_ds.schema.running import CheckpointConfig, EvaluationConfig, LoggingConfig
from clipo_ds.schema.task import FlawRates, TaskConfig
from clipo_ds.schema.train import AUTO_IMPORTANCE_CAP, TrainConfig

__all__ = [
    "AUTO_IMPORTANCE_CAP",
    "LARGEST_REWARD",
    "MAY_BE_INFINITE",
    "CheckpointConfig",
    "ContrastiveConfig",
    "DataConfig",
    "EvaluationConfig",
    "FlawRates",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParityConfig",
    "RewardConfig",
    "RewardFunction",
    "RolloutConfig",
    "SamplingConfig",
    "ServerConfig",
    "TaskConfig",
    "TrainConfig",
    "VllmConfig",
    "require",
]
