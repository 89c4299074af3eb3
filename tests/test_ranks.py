"""Two ranks with unequal work under ZeRO-3, or of which one fails: nobody waits for ever."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch
from launching import SMALL, metrics, run
from ranks import on_ranks
from small_policy import make_batch, make_policy, save_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from clipo_ds import distributed
from clipo_ds.batching import equalise
from clipo_ds.checkpoint import Progress, save_checkpoint
from clipo_ds.distributed import Ranks
from clipo_ds.metrics import percentile_999
from clipo_ds.records import open_run
from clipo_ds.resuming import check_same_settings
from clipo_ds.schema import TaskConfig, TrainConfig
from clipo_ds.types import InputError, NotSaved

# r: both ranks have rows, p: none has, a and b: only the first or the second has; no scoring pass in between.
COURSE = "prbabrppab"


NUMBERS = (1_500, 700)  # of values on the two ranks


def values(rank: int) -> torch.Tensor:
    return torch.randn(NUMBERS[rank], generator=torch.Generator().manual_seed(rank)) + rank


def measure(ranks: Ranks, folder: str) -> None:
    nothing = torch.zeros(0)
    found = [
        percentile_999(values(ranks.rank), ranks),
        percentile_999(values(0) if ranks.is_main else nothing, ranks),
        percentile_999(values(1)[: 1 - ranks.rank], ranks),
        percentile_999(nothing, ranks),
    ]
    torch.save(found, f"{folder}/percentiles_{ranks.rank}.pt")


class Odd(Exception):
    """One that another process cannot make anew."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} {why}")


def fail_together(ranks: Ranks, folder: str) -> None:
    try:
        with distributed.together():
            if ranks.rank == 1:
                raise Odd("rank 1", "alone")
    except Exception as error:
        found = (type(error).__name__, str(error), distributed.is_everywhere(error))
        torch.save(found, f"{folder}/failure_{ranks.rank}.pt")
    assert not distributed.is_everywhere(ValueError("of this rank"))


def walk(ranks: Ranks, folder: str) -> None:
    measure(ranks, folder)
    fail_together(ranks, folder)
    policy = make_policy(folder, ranks, stage=3)
    norms = []
    for letter in COURSE:
        busy = letter == "r" or (letter == "a" and ranks.rank == 0) or (letter == "b" and ranks.rank == 1)
        batch = make_batch() if busy else equalise([], 1, 0)[0]
        scores = policy.forward(batch)
        # As the update does: a padding batch touches every output, a real one what its loss needs.
        idle = (scores.logprobs.sum() + scores.pooled.sum()) * 0.0
        policy.backward(idle if batch.is_padding else -scores.logprobs.sum() * 0.1, last=True)
        norms.append(policy.step())
    torch.save(norms, f"{folder}/norms_{ranks.rank}.pt")


def disagree(ranks: Ranks, folder: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    policy = make_policy(folder, ranks, stage=3)

    def save(step: int) -> None:
        progress = Progress(step, prompts_drawn=4 * step)
        save_checkpoint(Path(folder, "run"), progress, policy, tokenizer, None, ranks, keep=1, data={})

    save(1)
    # Rank 1 looks at a disk where nothing is, and hears what rank 0 sees.
    assert distributed.from_main(Path(folder if ranks.is_main else "nowhere").exists)
    with pytest.raises(KeyError, match="of rank 0 alone"):  # whatever it is, or rank 1 would wait
        distributed.from_main(lambda: {}["of rank 0 alone"])
    with pytest.raises(InputError, match="`seed` must be the same on all ranks, got 0 on rank 0 and 1 on rank 1"):
        own = TrainConfig(seed=ranks.rank, task=TaskConfig())
        check_same_settings(own, distributed.broadcast_object(own), ranks)
    if ranks.rank == 1:  # a limit that stands for its disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        save(2)
    except NotSaved as error:
        (Path(folder) / f"said_by_{ranks.rank}").write_text(str(error))


def test_ranks_decide_together_what_is_saved_and_that_it_cannot_be_where_one_has_no_room(tmp_path):
    on_ranks(2, disagree, save_model(tmp_path))
    first, second = ((tmp_path / f"said_by_{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert re.search(r"'\S+/zero_pp_rank_1_mp_rank_00_\w+_states.pt' could not be written: ", first)
    assert "the checkpoint of step 1 is whole; make room, then go on with --resume auto" in first
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]


def test_a_rank_without_rows_keeps_in_step_with_one_that_has_some(tmp_path):
    folder = save_model(tmp_path)
    on_ranks(2, walk, folder)
    first, second = (torch.load(tmp_path / f"norms_{rank}.pt") for rank in (0, 1))
    assert first == second
    assert [norm == 0 for norm in first] == [letter == "p" for letter in COURSE]
    # By nearest rank the 3rd largest of 2,200 and the 2nd of 1,500; the one that is alone, and nothing.
    everyone = torch.cat([values(0), values(1)]).sort(descending=True).values
    expected = [everyone[2], values(0).sort(descending=True).values[1], values(1)[0], 0.0]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"percentiles_{rank}.pt") == [float(value) for value in expected]
    assert torch.load(tmp_path / "failure_0.pt") == ("RuntimeError", "Odd: rank 1 alone", True)
    assert torch.load(tmp_path / "failure_1.pt") == ("Odd", "rank 1 alone", True)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("generate", "error: rank 1 alone: not finite"),
        (
            "reward",
            "error: `reward.functions` '{folder}/mine.py:f' must not raise, got ZeroDivisionError: rank 1 alone (",
        ),
        ("load_weights", "error: rank 1 alone: no room for weights; stopped after step 2 of 4; go on with --resume"),
        (
            "score",
            "error: step 2: mismatch/mean_abs = nan: the trainer gives sampled tokens log-probabilities that are",
        ),
    ],
)
def test_when_one_rank_fails_all_of_them_stop_with_one_line(tmp_path, monkeypatch, method, words):
    monkeypatch.setenv("FAILS_IN", method)
    monkeypatch.setenv("FAILS_IN_FOLDER", str(tmp_path))
    folder = tmp_path / "run"
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "calls = []\n"
        "def f(responses):\n"
        "    calls.append(len(responses))\n"
        "    if os.environ['RANK'] == '1' and os.environ['FAILS_IN'] == 'reward' and len(calls) == 2:\n"
        "        raise ZeroDivisionError('rank 1 alone')\n"
        "    return [0.0] * len(responses)\n"
    )
    settings = [
        *SMALL, "--ds_config=ds_configs/zero3_cpu.json", "--steps=4", f"--run_dir={folder}",
        f"--reward.functions={{function: '{tmp_path}/mine.py:f'}}",
    ]  # fmt: skip
    done = run("../tests/failing_rank.py", *settings, ranks=2)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "rank 1 alone" in line or "mismatch" in line]
    assert line.startswith(words.format(folder=tmp_path))
    # Nobody was killed by the launcher.
    code = "2" if method == "reward" else "1"
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [code, code]
    steps = 2 if method == "load_weights" else 1  # a step whose weights did not go out is whole, and the last
    assert len(metrics(folder)) == steps
    checkpoint = folder / "checkpoints" / f"step_{steps:06d}"
    if method == "score":  # broken weights on one rank are broken weights
        assert line.endswith("step 1 of 4 is not saved: its weights are not finite; there is no earlier checkpoint")
        assert open_run(folder).rollouts(step=2).num_rows == 32
    else:
        assert line.endswith(f"go on with --resume {checkpoint}")
    assert (checkpoint / "checkpoint.json").exists() == (method != "score")
