"""scripts/train.py, but each rank stands in a folder of its own, as on a machine of its own: a second node may lack the
data that the first has."""

import os
import socket

if __name__ == "__main__":
    os.chdir(os.path.join(os.environ["FOLDER_OF_RANKS"], f"rank{os.environ['RANK']}"))
    socket.gethostname = lambda: f"node{os.environ['RANK']}"
    from clipo_ds.cli import run_ranks, train_main

    run_ranks(train_main)
