"""A machine's data is read by one of its ranks, the others see the same, and an error of one is everyone's."""

from __future__ import annotations

import datetime
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from ranks import on_ranks

from clipo_ds import loading, shared_memory
from clipo_ds.config import load_config
from clipo_ds.distributed import Ranks
from clipo_ds.prompt_store import StoredPrompts, write_prompts
from clipo_ds.types import Prompt

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}="
HOSTS = ("first", "first", "second")
SETTINGS = [
    "--data.train=train.jsonl", "--data.test=[test.jsonl, other/test.jsonl]", "--rollout.prompts_per_step=3",
]  # fmt: skip


def test_stored_prompts_are_those_that_were_written_also_when_the_file_is_gone(tmp_path: Path) -> None:
    odd = {"day": datetime.date(2024, 1, 5), "bytes": b"\0", "nested": [{"a": None}]}
    prompts = [
        Prompt(3, "1+1=", (1, 70_000, 3), "2", "sums", metadata=odd),
        Prompt(5, "naïve=", (), "é", "words", kind="choice"),
        Prompt(6, "3=", (4,), "3", "sums"),
    ]
    write_prompts(tmp_path / "prompts", prompts)
    stored = StoredPrompts(tmp_path / "prompts")
    (tmp_path / "prompts").unlink()
    assert len(stored) == 3 and list(stored) == prompts
    assert (stored[-1], stored[1:], stored[:2]) == (prompts[-1], prompts[1:], prompts[:2])
    with pytest.raises(IndexError, match="`index` must be below 3, got 3"):
        stored[3]


def test_no_prompts_are_stored_as_none(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts", [])
    assert list(StoredPrompts(tmp_path / "prompts")) == []


def write_data(folder: Path, *, answer: str = "2") -> None:
    (folder / "other").mkdir(parents=True)
    rows = [{"question": f"{i}+1", "answer": i + 1, "level": 1.5} for i in range(4)]
    for name, some in (("train", rows), ("test", rows[:2]), ("other/test", rows[:1])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text + json.dumps({"question": "1+1", "answer": answer}) + "\n")


def load_in_turn(ranks: Ranks, folder: str) -> None:
    """Load the data in one way after the other, and write down what came of each."""
    socket.gethostname = lambda: HOSTS[ranks.rank]
    seen: dict[str, Any] = {}

    def load(way: str) -> None:
        try:
            data = loading.load_data(load_config("smollm2_cpu", SETTINGS), byte_tokenizer(TEMPLATE), ranks)
            whole = {name: [vars(p) for p in some] for name, some in {"train": data.prompts, **data.tests}.items()}
            seen[way] = [type(data.prompts).__name__, data.longest_prompt, whole]
        except Exception as error:
            seen[way] = [type(error).__name__, str(error)]

    def stand_in(*folders: str) -> None:
        os.chdir(Path(folder, folders[ranks.rank]))

    stand_in("whole", "empty", "whole")
    load("shared")
    stand_in("whole", "empty", "changed")
    load("machines differ")
    stand_in("whole", "whole", "empty")
    load("one machine lacks it")
    stand_in("broken", "whole", "whole")
    load("the first reader fails")
    stand_in("whole", "whole", "whole")
    if ranks.rank == 1:
        loading.StoredPrompts = unseen
    load("one cannot open it")
    loading.StoredPrompts = StoredPrompts
    shared_memory.SHARED_MEMORY = Path(folder, "nowhere")
    tempfile.tempdir = str(Path(folder, "nowhere"))
    load("no place has room")
    tempfile.tempdir = None
    if ranks.rank == 2:
        loading.load_prompts = None
    load("a fault of the program")
    Path(folder, f"seen{ranks.rank}.json").write_text(json.dumps(seen))


def unseen(path: Path) -> None:
    raise FileNotFoundError(path)


def test_one_rank_of_a_machine_reads_for_all_of_its_ranks_and_nobody_waits_for_one_that_fails(tmp_path: Path) -> None:
    write_data(tmp_path / "whole")
    write_data(tmp_path / "changed", answer="3")
    write_data(tmp_path / "broken")
    (tmp_path / "broken" / "train.jsonl").write_text("{")
    (tmp_path / "empty").mkdir()
    before = {folder for place in shared_memory.places() for folder in place.glob(f"{shared_memory.PREFIX}*")}
    on_ranks(3, load_in_turn, str(tmp_path))
    left = {folder for place in shared_memory.places() for folder in place.glob(f"{shared_memory.PREFIX}*")}
    assert left <= before
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(3)]

    def kinds(way: str) -> list[str]:
        return [rank[way][0] for rank in seen]

    # Rank 1 has no such files where it stands: it read those of rank 0.
    assert kinds("shared") == ["StoredPrompts"] * 3
    assert seen[0]["shared"] == seen[1]["shared"] == seen[2]["shared"]
    _, longest, sets = seen[0]["shared"]
    assert (longest, list(sets)) == (4, ["train", "test.jsonl", "other/test.jsonl"])
    assert [len(some) for some in sets.values()] == [5, 3, 2]
    second = {
        "uid": 1, "text": "1+1=", "token_ids": [16, 10, 16, 28], "ground_truth": "2", "source": "train",
        "kind": "math", "metadata": {"answer": 2, "level": 1.5},
    }  # fmt: skip
    assert second.items() <= sets["train"][1].items()
    assert kinds("one cannot open it") == ["StoredPrompts", "list", "StoredPrompts"]
    assert kinds("no place has room") == ["list"] * 3
    assert all(rank[way][1:] == [longest, sets] for rank in seen for way in ("one cannot open it", "no place has room"))

    for way, message in (
        ("machines differ", "must hold the same on every machine, got other prompts on second (rank 2) than on first"),
        ("one machine lacks it", "`data.train` must name a file that exists, got 'train.jsonl' (on rank 2, second)"),
        ("the first reader fails", "train.jsonl, row 0 (line 1): the line must be one JSON object, got a syntax error"),
    ):
        assert kinds(way) == ["InputError"] * 3
        assert all(message in rank[way][1] for rank in seen), seen[0][way]
    assert kinds("a fault of the program") == ["RuntimeError"] * 3
    assert all(
        r["a fault of the program"][1] == "TypeError: 'NoneType' object is not callable (on rank 2, second)"
        for r in seen
    )
