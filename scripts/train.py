"""Train a policy: `deepspeed scripts/train.py --ds_config ds_configs/zero3.json --recipe NAME [--section.field value
…]`."""

from clipo_ds.cli import run_ranks, train_main

if __name__ == "__main__":
    run_ranks(train_main)
