"""Compare arms over seeds: `deepspeed scripts/compare.py --recipe demo --arms grpo,grpo+clipo --seeds 0,1,2`."""

import sys

from clipo_ds.cli import compare_main

if __name__ == "__main__":
    sys.exit(compare_main())
