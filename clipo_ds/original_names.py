"""Weights under the names of the folder that a model was published in.

transformers may hold weights otherwise than their folder has them: a mixture's experts as one tensor, an output head
under another name. Whoever reads a folder (`from_pretrained`, vLLM) wants the folder's names. Layer L2, imports torch
and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def original_weights(
    model: PreTrainedModel, shapes: Mapping[str, torch.Size], weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights as the model's published folder names and cuts them; always reads `weights` to the end.

    Args:
        model: The model of transformers, without adapters around it; its values are not read.
        shapes: Name and whole shape of every weight that will come, as transformers has them.
        weights: These weights, in any order; a tensor is not needed after the next one is asked for.

    Yields:
        Name and tensor, often a view of the one that came. What the folder has as one tensor comes when its last part
        has come.
    """
    partners = _partners(model, shapes)
    waiting: dict[str, Tensor] = {}
    for name, tensor in weights:
        if name not in partners:
            yield name, tensor
            continue
        together = partners[name]
        if len(together) > 1:
            waiting[name] = tensor.clone()
            if not together <= waiting.keys():
                continue
            yield from revert_weight_conversion(model, {part: waiting.pop(part) for part in sorted(together)}).items()
        else:
            yield from revert_weight_conversion(model, {name: tensor}).items()
    if waiting:
        raise RuntimeError(f"weight sync failed: {min(waiting)} came without what it is saved together with")


def original_shapes(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Name and shape of every weight in the model's published folder."""
    return {name: tensor.shape for name, tensor in original_weights(model, shapes, _blank(shapes).items())}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that a model's folder holds beside its parameters, by name (a router's correction bias, say)."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _partners(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> dict[str, set[str]]:
    """For every weight that the folder has otherwise: the weights that must be converted with it, itself included.

    That a weight stands alone is found by trying, once for all layers; the others of a layer go together.
    """
    blank = _blank(shapes)
    whole = revert_weight_conversion(model, blank)
    if whole.keys() == blank.keys() and all(whole[name].shape == shape for name, shape in shapes.items()):
        return {}
    alone: dict[str, bool] = {}
    partners: dict[str, set[str]] = {}
    rest: dict[str, set[str]] = {}
    for name, tensor in blank.items():
        kind = re.sub(r"\.\d+\.", ".N.", name)
        if kind not in alone:
            own = revert_weight_conversion(model, {name: tensor})
            alone[kind] = all(key in whole and whole[key].shape == part.shape for key, part in own.items())
        if alone[kind]:
            partners[name] = {name}
        else:
            layer = re.match(r".*?\.\d+\.", name)
            partners[name] = rest.setdefault(layer[0] if layer else "", set())
            partners[name].add(name)
    return partners


def _blank(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
