"""One HTML file that shows a run: `python scripts/report.py RUN out.html [--png DIR]`. Needs no torch and no GPU."""

from __future__ import annotations

import argparse
import sys

from clipo_ds.types import InputError
from clipo_ds.viz.report import write_pictures, write_report


def main() -> int:
    """Exit codes as those of the other scripts: 0 done, 2 something the user gave is wrong."""
    parser = argparse.ArgumentParser(description="Show a run as one self-contained HTML file.")
    parser.add_argument("run", help="run folder, finished or in progress")
    parser.add_argument("out", help="HTML file to write")
    parser.add_argument("--png", metavar="DIR", help="write the figures as PNGs too; needs kaleido and a Chromium")
    parser.add_argument("--scale", type=float, default=2.0, help="pixels of the PNGs for one (default: 2)")
    arguments = parser.parse_args()
    try:
        written = [write_report(arguments.run, arguments.out)]
        if arguments.png is not None:
            written += write_pictures(arguments.run, arguments.png, scale=arguments.scale)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.writelines(f"{path}\n" for path in written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
