"""What runs inside a vLLM server: weights read from files in memory, and facts for the trainer's checks.

`scripts/serve.py` names `ServerExtension` in vLLM's `--worker-extension-cls`. Importing this module registers the
weight-transfer backend FILES beside vLLM's own, so that a server without a GPU takes weights through the same four
calls (init, start, update, finish) as one that is fed over NCCL. Layer L2; no other module imports it: it lives in the
server's processes.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from clipo_ds.vllm_loading import Reload

FILES = "clipo_ds_files"
"""Name of the weight-transfer backend below."""


@dataclass
class FilesInit(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first file."""


@dataclass
class FilesUpdate(WeightTransferUpdateInfo):
    """One piece of an update."""

    path: str | None = None  # a safetensors file that trainer and server both see; None for no more weights
    last: bool = False  # every weight of the model must have come by now


class FilesEngine(WeightTransferEngine[FilesInit, FilesUpdate]):
    """Takes the weights of an update from safetensors files, one file a call, under their Hugging Face names.

    The last call of an update refuses it where a parameter was left out.
    """

    init_info_cls = FilesInit
    update_info_cls = FilesUpdate

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Prepare the model to be loaded again, layer by layer."""
        self._update = Reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one file. vLLM's own method would wait for an accelerator too, and there may be none.

        Raises:
            RuntimeError: After the last file, a parameter was left out.
        """
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception:
            self._update.give_up()
            raise

    def receive_weights(self, update_info: FilesUpdate) -> None:
        """Load the weights of one file; check that nothing is missing after the last."""
        if update_info.path is not None:
            self._update.load(load_file(update_info.path).items())
        missing = self._update.left_out() if update_info.last else []
        if missing:
            raise RuntimeError(f"weight sync failed: {len(missing)} weights were left out ({missing[0]}, …)")

    def finish_weight_update(self) -> None:
        """Put the loaded layers in place."""
        self._update.finish()

    def shutdown(self) -> None:
        """Nothing is held."""


class ServerExtension:
    """Calls that the trainer makes on a server's workers through `/collective_rpc`."""

    vllm_config: Any

    def clipo_ds_describe(self, probe: str) -> dict[str, Any]:
        """What this worker runs, and what it reads from a file of the trainer's.

        Args:
            probe: Path of a text file; its content shows that trainer and server share the memory that it lies in.
        """
        config, transfer = self.vllm_config, self.vllm_config.weight_transfer_config
        model = config.model_config
        text = model.hf_text_config
        return {
            "host": socket.gethostname(),
            "probe": Path(probe).read_text() if Path(probe).is_file() else None,
            "transfer": None if transfer is None else transfer.backend,
            "model": model.model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "logprobs_mode": model.logprobs_mode,
            "world_size": config.parallel_config.world_size_across_dp,
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
        }


# Workers import this module once a process; a test may import it beside them.
if FILES not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(FILES, FilesEngine)
