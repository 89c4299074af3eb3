"""scripts/train.py, but each rank stands in a folder of its own: a second node may lack the data that the first has."""

import os

if __name__ == "__main__":
    os.chdir(os.path.join(os.environ["FOLDER_OF_RANKS"], f"rank{os.environ['RANK']}"))
    from clipo_ds.cli import run_ranks, train_main

    run_ranks(train_main)
