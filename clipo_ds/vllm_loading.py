"""New weights into a running vLLM model, and which of its parameters they left out.

vLLM loads a layer when all of its weights have come and keeps old values where none came, in silence; so whoever
replaces weights counts what was taken. Layer L2, runs where vLLM's workers are: in a rank's own process or a server's.
vLLM itself is imported inside functions, since it is optional and takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Reload:
    """One update of a model's weights, in one piece or several; begins when it is made.

    Args:
        model: vLLM's.
        model_config: vLLM's, of this model.
    """

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

        self._model = model
        self._model_config = model_config
        self._expected = {name for name, _ in model.named_parameters()}
        self._taken: set[str] = set()
        self._names_what_it_takes = True
        _repack_experts(model)
        initialize_layerwise_reload(model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give the model a piece of the weights, under the names of its published folder."""
        taken = self._model.load_weights(weights)
        # Most models say which parameters they took, and an empty set where they took none; the others say None, and
        # leave it to their layers.
        self._names_what_it_takes &= taken is not None
        self._taken |= self._expected if taken is None else set(taken)

    def left_out(self) -> list[str]:
        """Parameters that no piece has held so far."""
        # A layer may rightly stay without a number: the last ranks of a tensor-parallel group may hold nothing but the
        # padding of a small vocabulary.
        return sorted((self._expected - self._taken) | (set() if self._names_what_it_takes else self._untouched()))

    def finish(self) -> None:
        """Put the loaded layers in place."""
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

        finalize_layerwise_reload(self._model, self._model_config)

    def give_up(self) -> None:
        """Put the old weights back into layers that are not whole; the *next* update would complete them wrongly."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights = []
            info.load_numel = 0
        self.finish()

    def _untouched(self) -> set[str]:
        """Parameters of layers that wait for their first weight."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        waiting = {
            name for name, layer in self._model.named_modules()
            if (info := get_layerwise_info(layer)).can_load() and info.load_numel_total and not info.load_numel
        }  # fmt: skip
        return {name for name in self._expected if name.rpartition(".")[0] in waiting}


def reload_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Replace all weights of a worker's model, as vLLM's own method of this name does; what they left out.

    Args:
        worker: vLLM's, which `collective_rpc` gives.
        weights: Under the names of the model's published folder, layer by layer.
    """
    from vllm.config import set_current_vllm_config

    runner = worker.model_runner
    with set_current_vllm_config(worker.vllm_config):
        update = Reload(runner.get_model(), runner.model_config)
        try:
            update.load(weights)
        except Exception:
            update.give_up()
            raise
        left_out = update.left_out()
        update.finish()
        runner.reset_lora_state()
        runner.reset_encoder_cache()
        runner.reset_mm_cache()
    return left_out


def _repack_experts(model: nn.Module) -> None:
    """Let the experts of a mixture be packed again on a CPU, where vLLM 0.32 packs them for its kernel the first time
    only and takes later weights for packed ones. On GPUs the kernel must stay, since graphs were captured with it."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and next(layer.parameters()).device.type == "cpu":
            method.moe_kernel = None
