"""scripts/train.py, but rank 1 stands in another folder, as a second node without the data would."""

import os
import sys

if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        os.chdir("/")
    from clipo_ds.cli import train_main

    sys.exit(train_main())
