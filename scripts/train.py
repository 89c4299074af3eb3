"""Train a policy: `deepspeed scripts/train.py --ds_config ds_configs/zero3.json --recipe NAME [--section.field value
…]`."""

import sys

from clipo_ds.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
