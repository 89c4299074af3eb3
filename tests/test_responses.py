"""The responses of evaluations in the run folder: kept by test set and step, and cut where a run is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipo_ds.records import RESPONSE_SCHEMA, RunWriter, open_run
from clipo_ds.superseded import move_aside
from clipo_ds.types import InputError


def new_run(path: Path) -> RunWriter:
    return RunWriter.create(path, config_yaml="steps: 3\n", ds_config={}, environment={})


def columns(step: int) -> dict:
    return {
        "uid": [0, 0, 1, 1], "sample": [0, 1, 0, 1], "prompt": ["p", "p", "q", "q"], "response": [f"after {step}"] * 4,
        "ground_truth": ["7"] * 4, "extracted": ["7", None, "7", "1"], "correct": [True, False, True, False],
        "status": ["verified", "no_answer", "verified", "wrong"],
        "process_consistent": [True, None, False, None], "num_tokens": [3] * 4, "truncated": [False] * 4,
    }  # fmt: skip


def test_responses_of_an_evaluation_are_kept_by_test_set_and_step(tmp_path):
    writer, run = new_run(tmp_path), open_run(tmp_path)
    assert run.response_steps() == {}
    for step in (0, 2):
        for data in ("sums", "org/sums:test 2"):
            file = writer.write_responses(step, data, columns(step))
    assert file.name == "step_000002-org%2Fsums%3Atest%202.parquet"
    assert run.response_steps() == {"sums": [0, 2], "org/sums:test 2": [0, 2]}
    table = run.responses("org/sums:test 2", 2)
    assert table.schema == RESPONSE_SCHEMA
    assert table["response"].to_pylist() == ["after 2"] * 4
    writer.write_responses(2, "sums", columns(7))  # once more, in place of the first
    assert run.responses("sums", 2, ["response"]).to_pydict() == {"response": ["after 7"] * 4}
    with pytest.raises(InputError, match=r"recorded responses \(0, 2 for 'sums'\), got 1"):
        run.responses("sums", 1)
    file.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="must be a whole parquet file"):
        run.responses("org/sums:test 2", 2)


def test_resuming_moves_the_responses_after_the_step_aside(tmp_path):
    writer = new_run(tmp_path)
    for step in (0, 1, 2):
        writer.write_responses(step, "sums", columns(step))
    moved = move_aside(tmp_path, 1)
    assert open_run(tmp_path).response_steps() == {"sums": [0, 1]}
    assert open_run(moved.folder).response_steps() == {"sums": [2]}


def test_an_evaluation_in_training_leaves_every_response_and_its_verdict(recorded_run):
    run = open_run(recorded_run)
    assert run.response_steps() == {"arithmetic": [0, 3, 6], "arithmetic_harder": [0, 3, 6]}
    for row in run.evaluations():
        table = run.responses(row["data"], row["step"]).to_pandas()
        assert len(table) == row["num_problems"] * row["num_samples"]
        assert table["uid"].drop_duplicates().tolist() == list(range(row["num_problems"]))
        assert table["sample"].tolist() == [*range(row["num_samples"])] * row["num_problems"]
        assert table["correct"].mean() == pytest.approx(row["accuracy"])
        known = table["process_consistent"].dropna()
        assert known.mean() == pytest.approx(row["process_consistent"])
        assert (table["prompt"] != "").all() and (table["response"] != "").any()
