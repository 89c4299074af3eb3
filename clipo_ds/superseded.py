"""What a resumed run leaves behind: the records of the steps that it makes again, moved aside and never deleted.

    superseded/step_000100-20261128-081500/    what came after step 100, when the run went on from there
        config.yaml  ds_config.json  environment.jsonl                          what ran until then
        checkpoints/  rollouts/  evaluations/  separate_evaluations/            the files of later steps
        metrics.jsonl  evaluations.jsonl  separate_evaluations/evaluations.jsonl   the rows of later steps

Nothing in the program reads that folder of its own accord. It is laid out as a run folder, for whoever names it to
`open_run` or scripts/evaluate.py, or resumes from a checkpoint in it. Layer L1, no torch.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from clipo_ds.folder_lock import fresh_folder
from clipo_ds.records import CONFIG, DS_CONFIG, EVALUATIONS, METRICS, STARTS, SUPERSEDED, write_beside

# Folders whose entries are named after their step, and files with a row a step; in words for people.
FOLDERS = {
    "checkpoints": "checkpoint", "rollouts": "file of rollouts", "evaluations": "file of responses",
    "separate_evaluations": "file of separate evaluations",
}  # fmt: skip
ROWS = {
    "separate_evaluations/evaluations.jsonl": "separate evaluation",
    EVALUATIONS: "evaluation",
    METRICS: "row of metrics",
}


@dataclass
class Superseded:
    """What was moved aside; `str()` names it for people."""

    folder: Path
    counts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{count} {_plural(what) if count > 1 else what}" for what, count in self.counts.items())


def move_aside(run_dir: Path, step: int) -> Superseded | None:
    """Move what a run folder holds of later steps than `step` into a new folder under superseded/; None if nothing is.

    Whoever is killed in here leaves a run that goes on from its newest checkpoint: checkpoints go first, the newest
    before the others, so that all that belongs to one that is there still stands beside it. Every file moves by one
    rename; rows are written there before they are taken out here, so that at worst they are in both places.
    """
    files = {name: _later_entries(run_dir / name, step) for name in FOLDERS}
    rows = {name: _split(run_dir / name, step) for name in ROWS}
    if not any(files.values()) and not any(later for _, later in rows.values()):
        return None
    moved = Superseded(fresh_folder(run_dir / SUPERSEDED, f"step_{step:06d}-{time.strftime('%Y%m%d-%H%M%S')}"))
    for name in (DS_CONFIG, STARTS, CONFIG):
        if (run_dir / name).exists():
            shutil.copy2(run_dir / name, moved.folder / name)
    for name, later in files.items():
        for path in later:
            (moved.folder / name).mkdir(exist_ok=True)
            os.rename(path, moved.folder / name / path.name)
        if later:
            moved.counts[FOLDERS[name]] = len(later)
    for name, (kept, after) in rows.items():
        if after:
            (moved.folder / name).parent.mkdir(exist_ok=True)
            (moved.folder / name).write_bytes(b"".join(after))
            write_beside(run_dir / name, functools.partial(Path.write_bytes, data=b"".join(kept)))
            moved.counts[ROWS[name]] = len(after)
    return moved


def _later_entries(folder: Path, step: int) -> list[Path]:
    """Entries of later steps, the latest first."""
    found = ((re.match(r"step_(\d+)\b", path.name), path) for path in folder.glob("step_*"))
    later = ((int(match[1]), path) for match, path in found if match and int(match[1]) > step)
    return [path for _, path in sorted(later, reverse=True)]


def _split(file: Path, step: int) -> tuple[list[bytes], list[bytes]]:
    """The lines of a jsonl file up to a step and those after it, as they stand; a torn one is of the latter."""
    kept: list[bytes] = []
    later: list[bytes] = []
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for line in lines:
        try:
            is_later = not line.endswith(b"\n") or json.loads(line)["step"] > step
        except ValueError:  # its writer was killed, or its disk was full
            is_later = True
        (later if is_later else kept).append(line)
    return kept, later


def _plural(what: str) -> str:
    """Several of them.

    >>> _plural("file of rollouts"), _plural("checkpoint")
    ('files of rollouts', 'checkpoints')
    """
    first, *rest = what.split(" of ")
    return " of ".join([f"{first}s", *rest])
