"""Export a run's policy: `python scripts/export.py RUN_OR_CHECKPOINT OUT`."""

import sys

from clipo_ds.cli import export_main

if __name__ == "__main__":
    sys.exit(export_main())
