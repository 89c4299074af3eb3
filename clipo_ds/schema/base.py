"""The one form that every section's errors have, and which numbers may be infinite."""

from __future__ import annotations

from typing import Any

from clipo_ds.types import InputError

MAY_BE_INFINITE = ("contrastive.floor", "objective.importance_cap", "optimizer.max_grad_norm")


def require(condition: bool, name: str, rule: str, value: Any) -> None:
    """Raise `InputError` in the one form that every error of the configuration has."""
    if not condition:
        raise InputError(f"`{name}` must be {rule}, got {value!r}")
