"""What the contrastive term costs: the same loop with the term on and off, step by step in turn.

    deepspeed --num_accelerators 1 scripts/bench_overhead.py --ds_config ds_configs/zero3_cpu.json --recipe demo

Even steps run without the term and odd ones with it, on the same engine, policy and prompts' order, so that drift of
the machine hits both alike. Prints the median seconds of a step for both, and what the phase `contrastive` takes of a
step with it.
"""

import argparse
import statistics
import sys
import tempfile

from rich.console import Console

from clipo_ds import distributed
from clipo_ds.config import load_config
from clipo_ds.parts import build_parts, close_parts, preflight
from clipo_ds.trainer import train_step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo", help="recipe with a contrastive section (default: demo)")
    parser.add_argument("--ds_config", default="ds_configs/zero3_cpu.json")
    parser.add_argument("--pairs", type=int, default=15, help="steps with and steps without the term (default: 15)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            arguments.recipe,
            [*overrides, f"--ds_config={arguments.ds_config}", f"--run_dir={folder}/run", "--evaluation.every=null"],
        )
        ranks = distributed.start()
        parts = build_parts(preflight(config, ranks), ranks)
        term, seconds, shares = parts.term, {True: [], False: []}, []
        for step in range(1, 2 * arguments.pairs + 3):
            on = step % 2 == 1
            parts.term = term if on else None
            metrics = train_step(parts, parts.draw(), step).metrics
            if step <= 2:  # the first step of each kind warms caches up
                continue
            seconds[on].append(metrics["time/step"])
            if on:
                shares.append(metrics["time/contrastive"] / metrics["time/step"])
        close_parts(parts)
        if ranks.is_main:
            with_term, without = (statistics.median(seconds[on]) for on in (True, False))
            console = Console()
            console.print(
                f"median step with the term {with_term:.3f} s, without {without:.3f} s, ratio {with_term / without:.4f}"
            )
            console.print(f"the phase `contrastive` is {statistics.median(shares):.2%} of a step (goal: at most 2%)")
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
