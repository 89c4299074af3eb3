"""clipo_ds: contrastive policy optimisation for reasoning models with verifiable rewards, on DeepSpeed.

The functions below are the package's public ones; each lives in the module that the table names and is loaded when it
is first asked for (PEP 562), so that `import clipo_ds` and `import clipo_ds.records` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "ContrastiveHead",
    "__version__",
    "check_steps",
    "contrastive_loss",
    "contrastive_reward",
    "group_advantages",
    "kl_estimate",
    "load_config",
    "open_run",
    "policy_loss",
    "train",
    "verify_answer",
]

_HOME = {
    "ContrastiveHead": "contrastive",
    "check_steps": "steps",
    "contrastive_loss": "contrastive",
    "contrastive_reward": "contrastive",
    "group_advantages": "advantages",
    "kl_estimate": "objectives",
    "load_config": "config",
    "open_run": "records",
    "policy_loss": "objectives",
    "train": "trainer",
    "verify_answer": "answers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
