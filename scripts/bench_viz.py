"""What the pictures cost at scale: opening a run of 50,000 rollouts x 512 dimensions, redrawing, and peak memory.

    python scripts/bench_viz.py [--steps 50] [--folder DIR]

Writes such a run (about 50 MB, kept in DIR when it is given) and measures in a fresh process, Python's side alone: with
the browser, `bench_viz_browser.py` measures it. Prints one JSON object; `_cpu` are seconds of this
process's own, which a busy machine does not change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clipo_ds.records import RunWriter, open_run

GROUPS, GROUP_SIZE, SIZE = 125, 8, 512
NUM_PROMPTS = 2_000
WORDS = "so we add the two numbers and find that 12 + 30 = 42, then take away 2 to get 42 - 2 = 40. "


def write_run(path: Path, steps: int) -> None:
    """A run of steps x 1,000 rollouts whose right and wrong answers drift apart."""
    rng = np.random.default_rng(0)
    config = {"steps": steps, "seed": 0, "contrastive": {"weight": 0.2, "floor": -0.5}, "objective": {"name": "grpo"}}
    writer = RunWriter.create(path, config_yaml=yaml.safe_dump(config), ds_config={}, environment={})
    num = GROUPS * GROUP_SIZE
    directions = rng.normal(size=(NUM_PROMPTS, SIZE))
    for step in range(1, steps + 1):
        uid = np.repeat(rng.choice(NUM_PROMPTS, GROUPS, replace=False), GROUP_SIZE)
        correct = rng.random(num) < 0.3 + 0.5 * step / steps
        vectors = directions[uid] + 0.5 * rng.normal(size=(num, SIZE))
        vectors[:, :8] += np.where(correct, 3.0, -3.0)[:, None] * step / steps
        process = correct & (rng.random(num) < 0.8)
        contrast = np.where(correct, rng.uniform(-0.5, 0.1, num), 0.0).astype(np.float32)
        writer.write_rollouts(
            step,
            {
                "group": np.repeat(np.arange(GROUPS), GROUP_SIZE),
                "prompt": [f"Problem {n}: how many are left? " + WORDS * 2 for n in uid],
                "response": [WORDS * int(n) for n in rng.integers(4, 12, num)],
                "ground_truth": ["40"] * num,
                "correct": correct,
                "process_consistent": process,
                "reward": correct + contrast,
                "contrastive_loss": np.where(correct, 1.0, np.nan).astype(np.float32),
                "contrastive_reward": contrast,
                "advantage": rng.normal(size=num).astype(np.float32),
                "num_tokens": rng.integers(50, 500, num).astype(np.int32),
                "truncated": np.zeros(num, bool),
                "prompt_uid": uid,
                "outcome_reward": correct.astype(np.float32),
                "embedding": vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
            },
        )
        writer.write_metrics(step, {"accuracy/mean": float(correct.mean()), "time/step": 1.0})


def measure(path: Path) -> dict[str, float]:
    """Seconds and MB, in this process, which should be a fresh one."""
    from clipo_ds.viz.cluster_figures import cluster_figure
    from clipo_ds.viz.cluster_view import ClusterExplorer
    from clipo_ds.viz.frames import open_rollouts
    from clipo_ds.viz.interact import Plot
    from clipo_ds.viz.projections import project

    figures: dict[str, float] = {"imports_mb": _peak_mb()}

    def timed(name: str, call: Callable[[], Any], repeats: int = 1) -> Any:
        wall, cpu = [], []
        for _ in range(repeats):
            start = time.perf_counter(), time.process_time()
            result = call()
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
        figures[f"{name}_s"], figures[f"{name}_cpu"] = float(np.median(wall)), float(np.median(cpu))
        return result

    table = timed("open_table", lambda: open_rollouts(open_run(path)))
    figures["rollouts"] = len(table.frame)
    timed("read_all_embeddings", table.embeddings)
    view = timed("open_explorer", lambda: ClusterExplorer(path))
    timed("open_explorer_again", lambda: ClusterExplorer(path))
    for points in (5_000, 20_000):
        projection = project(table, max_points=points)
        plot = Plot(cluster_figure(table, projection).figure)
        shapes = itertools.cycle(("answer", "process"))
        timed(
            f"redraw_{points}_points",
            lambda plot=plot, projection=projection, shapes=shapes: plot.show_figure(
                cluster_figure(table, projection, shape=next(shapes)).figure
            ),
            repeats=6,
        )
    steps = iter(table.steps)
    timed("slider_with_separation", lambda: setattr(view._step, "value", next(steps)), repeats=10)
    timed("click", lambda: view.read(int(view._projection.rows[-1])))
    figures["peak_mb"] = _peak_mb()
    return figures


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Write the run, measure it in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of 1,000 rollouts each")
    parser.add_argument("--folder", help="where to keep the run")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        figures = {name: round(value, 3) for name, value in measure(Path(arguments.measure)).items()}
        sys.stdout.write(json.dumps(figures, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(arguments.folder or temporary) / f"bench_{arguments.steps}"
        if not path.exists():
            write_run(path, arguments.steps)
        subprocess.run([sys.executable, __file__, "--measure", str(path)], check=True)


if __name__ == "__main__":
    main()
