"""A policy without noise: what is trained is what was sampled and scored.

Layer L2: imports torch, transformers and `clipo_ds.families`. Dropout and its like (whole layers left out, jitter of
routers) draw another network in every training pass: then ratios are not 1 before the first update, and are clipped
for what chance did to them.

No list of names tells what draws. A model of transformers' own stays in evaluation mode, in which nothing does; in
training mode are only the gates of gradient checkpointing (it wants `layer.training`) while they are asked, never the
layer that runs behind them. Code that came with a model may mean more by evaluation mode (experts without gradients):
there the mode stays, and the rates of its dropout are set to 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from clipo_ds.families import is_own_code

# How configurations and modules end the names of their rates, and begin those of heads that are not here.
RATES = (
    "dropout",
    "dropout_p",
    "drop",
    "pdrop",
    "dropout_prob",
    "dropout_rate",
    "layerdrop",
    "drop_path",
    "jitter_noise",
)
OTHER_HEADS = ("classifier_", "summary_")
ADAPTER_DROPOUT = "lora_dropout"  # PEFT's name for it; a field of its own says whether it draws


class Silence:
    """Keeps the noise out of a model's training passes.

    Args:
        model: The language model, plain or wrapped by PEFT, with gradient checkpointing switched on where it shall be.
        plain: The same without PEFT.
    """

    def __init__(self, model: nn.Module, plain: nn.Module) -> None:
        self.model = model
        self._own_code = is_own_code(plain)
        adapters = [m for name, m in model.named_modules() if ADAPTER_DROPOUT in name.split(".")]
        self._adapters = [m for m in adapters if isinstance(m, nn.Dropout)]
        self.leaves_noise = any(m.p > 0 for m in self._adapters)
        if self._own_code:
            _set_rates_to_zero(plain, keep={id(m) for m in adapters})
            return
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._gates = [layer for layer in layers if layer.gradient_checkpointing]
        for layer in self._gates:
            layer._gradient_checkpointing_func = functools.partial(
                _checkpoint_silently, layer, layer._gradient_checkpointing_func
            )

    def begin(self) -> None:
        """Set the modes of all modules for a training pass; the model is in training mode."""
        if self._own_code:
            return
        self.model.eval()
        for gate in self._gates:
            gate.training = True
        for dropout in self._adapters:
            dropout.train()


def has_noise(model: nn.Module) -> bool:
    """Whether a configuration or a module says that training passes draw random numbers."""
    rates = vars(model.config.get_text_config()).items()  # type: ignore[union-attr,operator]
    return any(value for name, value in rates if _is_rate(name, value)) or any(
        module.p for module in model.modules() if isinstance(module, nn.Dropout)
    )


def _checkpoint_silently(
    layer: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoint a layer that is in evaluation mode while it runs, in the backward pass too."""

    def run(*inputs: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return function(*inputs)
        finally:
            layer.training = before

    return checkpoint(run, *args)


def _set_rates_to_zero(model: nn.Module, keep: set[int]) -> None:
    for module in model.modules():
        if id(module) in keep:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _set_to_zero(vars(module))
    # Configurations of parts stand inside that of the whole.
    config = model.config
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if part is not None:
            _set_to_zero(vars(part))


def _set_to_zero(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if _is_rate(name, value):
            values[name] = 0.0


def _is_rate(name: str, value: object) -> bool:
    return isinstance(value, float) and value > 0 and name.endswith(RATES) and not name.startswith(OTHER_HEADS)
