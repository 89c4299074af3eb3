"""Serve a notebook as a page on this machine: `python scripts/dashboard.py [RUN] [--notebook NAME] [--port 8866]`."""

import sys

from clipo_ds.viz.dashboard import main

if __name__ == "__main__":
    sys.exit(main())
