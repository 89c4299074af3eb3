"""Starts the scripts as a user does, through the DeepSpeed launcher or plain Python, and reads what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from clipo_ds.network import free_port

ROOT = Path(__file__).parents[1]
LAUNCHER = Path(sys.executable).with_name("deepspeed")
RANK_FACTS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIME_LIMIT = 900  # seconds; against hanging only

# The built-in task at a size that makes its model in seconds.
SMALL = [
    "--recipe=demo",
    "--task.warm_start_steps=300",
    "--task.warm_start_batch_size=64",
    "--task.hidden_size=64",
    "--task.num_layers=2",
    "--task.min_terms=2",
    "--task.max_terms=3",
    "--task.max_number=5",
    "--task.harder_max_terms=4",
    "--task.num_train_prompts=64",
    "--task.num_test_prompts=16",
    "--rollout.prompts_per_step=4",
    "--rollout.group_size=8",
    "--rollout.max_new_tokens=32",
    "--logging.show_every=2",
    "--evaluation.every=null",
]


def start(script: str, *arguments: str, ranks: int | None = None) -> subprocess.Popen[str]:
    """Start a script: on `ranks` DeepSpeed ranks, or in one plain Python process."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    if ranks is not None:
        launch = [str(LAUNCHER), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        command = [*launch, str(ROOT / "scripts" / script), *arguments]
    # A test that was a rank itself has left in the environment where its group met, and its port may still be held.
    environment = {name: value for name, value in os.environ.items() if name not in RANK_FACTS}
    # Two ranks on two cores: one thread each, or they wait for each other. The accelerator is the one of `conftest`.
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(script: str, *arguments: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script to its end and give its output and exit code."""
    process = start(script, *arguments, ranks=ranks)
    out, err = process.communicate(timeout=TIME_LIMIT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(*arguments: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run scripts/train.py and insist that it ends well."""
    done = run("train.py", *arguments, ranks=ranks)
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def comparable(row: dict[str, Any]) -> dict[str, float]:
    """What must agree between two ways of running the same step: all but seconds and speeds."""
    return {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/")) and v is not None}


def ds_config(folder: Path, stage: int) -> str:
    """A DeepSpeed file for CPU ranks at a ZeRO stage."""
    config = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    config["zero_optimization"] = {"stage": stage}
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return str(path)
