"""Compare arms over seeds: `deepspeed scripts/compare.py --recipe demo --arms grpo,grpo+clipo --seeds 0,1,2`."""

from clipo_ds.cli import compare_main, run_ranks

if __name__ == "__main__":
    run_ranks(compare_main)
