"""The one path by which weights leave the training engine: gathered piece by piece, LoRA merged on the way.

Whoever wants the policy's weights iterates over `iterate_weights` (the transformers sampler, which holds the same
modules) or `iterate_original_weights` (vLLM, the checkpoint's plain Hugging Face folder). Under ZeRO-3 parameters are
gathered in groups of a byte budget and given back before the next group; a LoRA update is added to a float32 temporary
and never to the base weight itself, so nothing drifts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import deepspeed
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from clipo_ds import distributed
from clipo_ds.generation import AdapterEngine, RolloutEngine
from clipo_ds.original_names import original_weights, saved_buffers
from clipo_ds.shared_memory import shared_folder
from clipo_ds.types import SamplerLost

logger = logging.getLogger(__name__)

DEFAULT_BYTE_BUDGET = 512 * 1024**2


@dataclass(frozen=True)
class _Weight:
    """One weight of the plain model, and the parameters that it is made of."""

    name: str
    parameter: nn.Parameter
    lora: LoraLayer | None = None

    def sources(self) -> list[nn.Parameter]:
        if self.lora is None:
            return [self.parameter]
        factors = [self.lora.lora_A[a].weight for a in self.lora.active_adapters]
        factors += [self.lora.lora_B[a].weight for a in self.lora.active_adapters]
        return [self.parameter, *factors]

    def value(self) -> Tensor:
        """The weight as a plain model has it; merged in float32 and rounded once to the base weight's dtype."""
        if self.lora is None:
            return self.parameter.detach()
        merged = self.parameter.detach().float()  # a copy where the base is half precision
        merged = merged.clone() if merged.data_ptr() == self.parameter.data_ptr() else merged
        for adapter in self.lora.active_adapters:
            up = self.lora.lora_B[adapter].weight.detach().float()
            down = self.lora.lora_A[adapter].weight.detach().float()
            merged.addmm_(up, down, alpha=self.lora.scaling[adapter])
        return merged.to(self.parameter.dtype)


def iterate_weights(model: nn.Module, *, byte_budget: int = DEFAULT_BYTE_BUDGET) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of the policy under the name that a plain Hugging Face model gives it, layer by layer.

    All ranks iterate together, to the end. A yielded tensor is valid until the next one is asked for: copy what is to
    be kept. Tied weights are yielded under each of their names, since a sampler that unties them would otherwise keep a
    stale output head.

    Args:
        model: The causal language model, plain or wrapped by PEFT; its parameters may be partitioned by ZeRO-3.
        byte_budget: Most bytes that are gathered at once; a single larger weight is gathered alone.

    Raises:
        ValueError: `byte_budget` is not positive.
    """
    if byte_budget <= 0:
        raise ValueError(f"`byte_budget` must be positive, got {byte_budget}")
    yield from _gathered(_list_weights(model), byte_budget)


def iterate_original_weights(
    model: nn.Module, *, byte_budget: int = DEFAULT_BYTE_BUDGET, tied: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """As `iterate_weights`, under the names and in the pieces of the model's published folder, saved buffers included.

    Args:
        model: As `iterate_weights`.
        byte_budget: As `iterate_weights`.
        tied: Yield a tied weight under each of its names; otherwise under the first, which is what a folder holds.
    """
    weights = _list_weights(model)
    if not tied:
        weights = list({id(weight.parameter): weight for weight in reversed(weights)}.values())[::-1]
    plain = _plain(model)
    buffers = saved_buffers(plain)
    shapes = {w.name: torch.Size(getattr(w.parameter, "ds_shape", w.parameter.shape)) for w in weights}
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}

    def values() -> Iterator[tuple[str, Tensor]]:
        yield from _gathered(weights, byte_budget)
        yield from buffers.items()

    yield from original_weights(plain, shapes, values())


def _gathered(weights: list[_Weight], byte_budget: int) -> Iterator[tuple[str, Tensor]]:
    for part in _within_budget(weights, byte_budget):
        sources = list({id(p): p for w in part for p in w.sources()}.values())
        partitioned = [p for p in sources if hasattr(p, "ds_id")]
        with torch.no_grad(), deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            for weight in part:
                yield weight.name, weight.value()


def iterate_adapter(model: PeftModel, *, byte_budget: int = DEFAULT_BYTE_BUDGET) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapter's own factors under PEFT's names, gathered like `iterate_weights`."""
    factors = [_Weight(name, p) for name, p in model.named_parameters() if _inside_adapter(name)]
    yield from _gathered(factors, byte_budget)


def sync_weights(model: nn.Module, engine: RolloutEngine, *, byte_budget: int = DEFAULT_BYTE_BUDGET) -> None:
    """Hand the policy's weights to a rollout engine; called by all ranks, each with its own engine.

    An engine that holds the base gets a LoRA policy's adapter, every other one all weights, the adapter merged.

    Raises:
        SamplerLost: An engine did not take the weights; on all ranks, in the words of the first that failed. Likewise
            anything else that an engine raises.
    """
    failure: Exception | None = None
    weights = iterate_adapter(model, byte_budget=byte_budget) if isinstance(engine, AdapterEngine) else None
    try:
        if weights is not None:
            state = {name: weight.cpu().clone() for name, weight in weights}
            with shared_folder() as folder:
                model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
                engine.load_adapter(folder)
        else:
            iterate = iterate_original_weights if engine.takes_original_names else iterate_weights
            weights = iterate(model, byte_budget=byte_budget)
            engine.load_weights(weights)
    except (OSError, RuntimeError) as error:
        failure = error if isinstance(error, SamplerLost) else SamplerLost(str(error))
    except Exception as error:  # of the engine's own code: the other ranks must not wait for this one
        failure = error
    # The gathers are collective: an engine that stopped early would leave the other ranks waiting.
    for _ in weights:
        failure = failure or SamplerLost("the rollout engine did not take all weights of the policy")
    distributed.raise_everywhere(failure)


def _list_weights(model: nn.Module) -> list[_Weight]:
    plain = _plain(model)
    weights: list[_Weight] = []
    for module_name, module in plain.named_modules():
        if _inside_adapter(module_name):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            owner = (
                plain.get_submodule(module_name.removesuffix(".base_layer"))
                if module_name.endswith("base_layer")
                else None
            )
            lora = owner if isinstance(owner, LoraLayer) and parameter_name == "weight" else None
            weights.append(_Weight(name.replace(".base_layer.", "."), parameter, lora))
    return weights


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _inside_adapter(module_name: str) -> bool:
    return any(part.startswith("lora_") for part in module_name.split("."))


def _within_budget(weights: list[_Weight], byte_budget: int) -> Iterator[list[_Weight]]:
    group: list[_Weight] = []
    size = 0
    for weight in weights:
        # ds_numel is the whole size of a partitioned parameter; its local numel is 0 between gathers.
        cost = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in weight.sources())
        if group and size + cost > byte_budget:
            yield group
            group, size = [], 0
        group.append(weight)
        size += cost
    if group:
        yield group
