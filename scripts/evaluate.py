"""Score a model on data files: `python scripts/evaluate.py --model RUN_OR_CHECKPOINT_OR_HF_ID --data FILE …`."""

import sys

from clipo_ds.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
