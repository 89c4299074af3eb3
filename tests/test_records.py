"""A run folder holds what was written, and a reader meanwhile finds whole things only."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clipo_ds.records import (
    ROLLOUT_SCHEMA,
    RunWriter,
    check_run_dir,
    describe_environment,
    embeddings,
    open_run,
)
from clipo_ds.superseded import move_aside
from clipo_ds.types import InputError


def new_run(path: Path) -> RunWriter:
    return RunWriter.create(
        path,
        config_yaml=yaml.safe_dump({"steps": 3, "contrastive": None, "optimizer": {"learning_rate": 1e-6}}),
        ds_config={"zero_optimization": {"stage": 3}},
        environment=describe_environment(world_size=1),
    )


def rollout_columns(step: int, num: int = 4, size: int = 3) -> dict:
    """`num` rollouts whose numbers all say the step, so that a mixed or torn file would show."""
    return {
        "group": [i // 2 for i in range(num)],
        "prompt": [f"prompt {step}"] * num,
        "response": [f"response {step}.{i}" for i in range(num)],
        "ground_truth": ["7"] * num,
        "extracted": [None if i == 0 else "7" for i in range(num)],
        "correct": np.arange(num) % 2 == 1,
        "status": ["wrong"] * num,
        "process_consistent": [None, True, False, True][:num],
        "reward": [float(step)] * num,
        "contrastive_loss": [None, 2.5, None, 0.5][:num],
        "contrastive_reward": [0.0] * num,
        "advantage": np.full(num, step, dtype=np.float32),
        "num_tokens": [step] * num,
        "truncated": [False] * num,
        "embedding": np.full((num, size), step, dtype=np.float32),
        "source": ["sums"] * num,
    }


# -- what ran ----------------------------------------------------------------------------------------------------------


def test_a_new_run_says_what_runs(tmp_path):
    new_run(tmp_path / "runs" / "a")
    run = open_run(str(tmp_path / "runs" / "a"))
    assert run.path == tmp_path / "runs" / "a"
    assert run.config == {"steps": 3, "contrastive": None, "optimizer": {"learning_rate": 1e-6}}
    assert run.ds_config == {"zero_optimization": {"stage": 3}}
    assert run.environment["world_size"] == 1
    assert run.environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run.environment["packages"]["pyarrow"] == pa.__version__


def test_a_run_that_has_just_begun_is_empty_and_readable(tmp_path):
    new_run(tmp_path)
    run = open_run(tmp_path)
    assert run.metrics() == run.evaluations() == run.rollout_steps() == []
    assert run.checkpoints() == {}
    assert run.rollouts().schema.equals(ROLLOUT_SCHEMA)
    early = run.rollouts(columns=["correct", "embedding"])
    assert early.column_names == ["correct", "embedding"]
    assert embeddings(early).shape[0] == 0
    with pytest.raises(InputError, match=r"`step` must be a step with rollouts \(none yet\), got 1"):
        run.rollouts(1)


def test_a_folder_that_is_not_empty_is_refused_with_the_remedies(tmp_path):
    new_run(tmp_path / "a")
    with pytest.raises(
        InputError, match=r"`run_dir` must be a new or empty folder.*--resume auto, or name another folder"
    ):
        new_run(tmp_path / "a")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"`run_dir` must be a folder that can be made and written"):
            check_run_dir(path)
    (tmp_path / "empty").mkdir()
    check_run_dir(tmp_path / "empty")
    check_run_dir(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"`run` must be a run folder, which holds a config.yaml, got '"):
            open_run(path)


# -- metrics and evaluations -------------------------------------------------------------------------------------------


def test_metrics_are_a_flat_object_a_step_with_the_step_first(tmp_path):
    writer = new_run(tmp_path)
    writer.write_metrics(1, {"reward/mean": np.float32(0.5), "tokens": np.int64(7), "note": "ä", "none": None})
    writer.write_metrics(2, {"reward/mean": math.nan, "policy/kl": -math.inf, "step": 2})
    first, second = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert first == '{"step": 1, "reward/mean": 0.5, "tokens": 7, "note": "ä", "none": null}'
    assert second == '{"step": 2, "reward/mean": null, "policy/kl": null}'
    assert open_run(tmp_path).metrics()[1] == {"step": 2, "reward/mean": None, "policy/kl": None}


def test_nested_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`metrics` must be flat, got .* under 'reward'"):
        new_run(tmp_path).write_metrics(1, {"reward": {"mean": 1.0}})


def test_evaluations_may_be_nested(tmp_path):
    writer = new_run(tmp_path)
    writer.write_evaluation(0, {"data": "test", "pass@k": {1: 0.5, 2: np.float64("nan")}, "interval": (0.25, np.inf)})
    expected = {"step": 0, "data": "test", "pass@k": {"1": 0.5, "2": None}, "interval": [0.25, None]}
    assert open_run(tmp_path).evaluations() == [expected]


def test_a_half_written_last_line_is_left_out(tmp_path):
    writer = new_run(tmp_path)
    writer.write_metrics(1, {"a": "ä"})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 2, "a": "ä'.encode()[:-1])  # torn inside a character
    assert open_run(tmp_path).metrics() == [{"step": 1, "a": "ä"}]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    writer = new_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1}\n{"step\n')
    writer.write_metrics(3, {})
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: the line must be a JSON object"):
        open_run(tmp_path).metrics()


# -- rollouts ----------------------------------------------------------------------------------------------------------


def test_rollouts_come_back_as_they_were_written(tmp_path):
    new_run(tmp_path).write_rollouts(12, rollout_columns(12))
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000012.parquet"]
    table = open_run(tmp_path).rollouts(12)
    assert table.column_names == [*ROLLOUT_SCHEMA.names, "embedding", "source"]
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 3)
    rows = table.to_pylist()
    assert rows[0] == {
        "step": 12,
        "group": 0,
        "prompt": "prompt 12",
        "response": "response 12.0",
        "ground_truth": "7",
        "extracted": None,
        "correct": False,
        "status": "wrong",
        "process_consistent": None,
        "reward": 12.0,
        "contrastive_loss": None,
        "contrastive_reward": 0.0,
        "advantage": 12.0,
        "num_tokens": 12,
        "truncated": False,
        "embedding": [12.0, 12.0, 12.0],
        "source": "sums",
    }
    assert rows[1]["contrastive_loss"] == 2.5
    for field in ROLLOUT_SCHEMA:
        assert table.schema.field(field.name).type == field.type


def test_rollouts_of_all_steps_are_read_in_order_and_by_column(tmp_path):
    writer = new_run(tmp_path)
    for step in (2, 10, 1):
        writer.write_rollouts(step, rollout_columns(step))
    run = open_run(tmp_path)
    assert run.rollout_steps() == [1, 2, 10]
    assert run.rollouts()["step"].to_pylist() == [1] * 4 + [2] * 4 + [10] * 4
    some = run.rollouts(columns=["reward", "step"])
    assert some.column_names == ["reward", "step"]
    assert some["reward"].to_pylist() == some["step"].to_pylist()
    with pytest.raises(InputError, match=r"`columns` must be of step, group, .*, source, got rewards, x"):
        run.rollouts(columns=["step", "rewards", "x"])
    with pytest.raises(InputError, match=r"`step` must be a step with rollouts \(1 to 10\), got 3"):
        run.rollouts(3)


def test_a_table_of_rollouts_becomes_a_data_frame(tmp_path):
    pandas = pytest.importorskip("pandas")
    writer = new_run(tmp_path)
    writer.write_rollouts(1, rollout_columns(1))
    writer.write_metrics(1, {"a": 1.0, "b": math.nan})
    frame = open_run(tmp_path).rollouts().to_pandas()
    assert frame["correct"].mean() == 0.5
    assert frame["embedding"][0].tolist() == [1.0, 1.0, 1.0]
    assert pandas.DataFrame(open_run(tmp_path).metrics())["b"].isna().all()


def test_nullable_columns_may_be_left_out(tmp_path):
    columns = rollout_columns(1)
    for name in ("extracted", "status", "process_consistent", "contrastive_loss", "contrastive_reward", "embedding"):
        del columns[name]
    new_run(tmp_path).write_rollouts(1, columns)
    table = open_run(tmp_path).rollouts()
    assert table["contrastive_loss"].null_count == 4
    assert "embedding" not in table.column_names
    with pytest.raises(InputError, match=r"is `logging.save_embeddings` off"):
        embeddings(table)


def test_missing_and_unequal_columns_are_refused(tmp_path):
    writer = new_run(tmp_path)
    columns = rollout_columns(1)
    with pytest.raises(ValueError, match=r"`columns` must be of one length \(4\), got 3 values in 'reward'"):
        writer.write_rollouts(1, {**columns, "reward": [1.0] * 3})
    del columns["reward"], columns["truncated"]
    with pytest.raises(ValueError, match="`columns` must hold reward, truncated, got step, group"):
        writer.write_rollouts(1, columns)
    assert open_run(tmp_path).rollout_steps() == []


def test_a_step_without_rollouts_can_be_written(tmp_path):
    writer = new_run(tmp_path)
    empty = {name: values[:0] for name, values in rollout_columns(1).items()}
    writer.write_rollouts(1, empty)
    writer.write_rollouts(2, rollout_columns(2))
    assert open_run(tmp_path).rollouts(1).num_rows == 0
    assert open_run(tmp_path).rollouts().num_rows == 4


def test_embeddings_become_one_array(tmp_path):
    writer = new_run(tmp_path)
    for step in (1, 2):
        writer.write_rollouts(step, rollout_columns(step))
    array = embeddings(open_run(tmp_path).rollouts(columns=["embedding"]))
    assert array.dtype == np.float16
    assert array.tolist() == [[1.0] * 3] * 4 + [[2.0] * 3] * 4
    # A slice of a table keeps its own rows.
    assert embeddings(open_run(tmp_path).rollouts().slice(3, 2)).tolist() == [[1.0] * 3, [2.0] * 3]


def test_steps_with_other_columns_are_filled_with_nulls(tmp_path):
    writer = new_run(tmp_path)
    columns = rollout_columns(1)
    del columns["embedding"], columns["source"]
    writer.write_rollouts(1, columns)
    writer.write_rollouts(2, rollout_columns(2))
    run = open_run(tmp_path)
    assert run.rollouts()["source"].to_pylist() == [None] * 4 + ["sums"] * 4
    array = embeddings(run.rollouts(columns=["embedding"]))
    assert np.isnan(array[:4]).all()
    assert (array[4:] == 2).all()


def test_a_folder_name_with_an_equals_sign_adds_no_column(tmp_path):
    folder = tmp_path / "lr=1e-6"
    new_run(folder).write_rollouts(1, rollout_columns(1))
    assert "lr" not in open_run(folder).rollouts().column_names


def test_the_columns_of_a_step_are_named_without_reading_its_rows(tmp_path):
    writer = new_run(tmp_path)
    writer.write_rollouts(1, rollout_columns(1))
    writer.write_rollouts(2, rollout_columns(2) | {"note": ["x"] * 4})
    run = open_run(tmp_path)
    assert set(run.rollout_columns(2)) - set(run.rollout_columns(1)) == {"note"}
    assert {"embedding", "response"} <= set(run.rollout_columns(1))
    with pytest.raises(InputError, match=r"`step` must be a step with rollouts \(1 to 2\), got 3"):
        run.rollout_columns(3)
    file = tmp_path / "rollouts" / "step_000002.parquet"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"step_000002.parquet` must be a whole parquet file"):
        run.rollout_columns(2)


def test_a_step_is_found_without_listing_all_steps(tmp_path, monkeypatch):
    new_run(tmp_path).write_rollouts(1, rollout_columns(1))
    run = open_run(tmp_path)
    monkeypatch.setattr(Path, "glob", None)
    assert "reward" in run.rollout_columns(1)
    assert run.rollouts(1, ["reward"]).num_rows == 4


def test_the_newest_file_may_be_unreadable_but_no_other(tmp_path):
    writer = new_run(tmp_path)
    for step in (1, 2):
        writer.write_rollouts(step, rollout_columns(step))
    newest = tmp_path / "rollouts" / "step_000002.parquet"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    run = open_run(tmp_path)
    assert run.rollouts()["step"].to_pylist() == [1] * 4
    with pytest.raises(InputError, match=r"step_000002.parquet` must be a whole parquet file"):
        run.rollouts(2)
    writer.write_rollouts(3, rollout_columns(3))
    with pytest.raises(InputError, match=r"step_000002.parquet` must be a whole parquet file"):
        run.rollouts()


def test_partial_files_are_not_seen(tmp_path):
    writer = new_run(tmp_path)
    writer.write_rollouts(1, rollout_columns(1))
    (tmp_path / "rollouts" / ".step_000002.parquet.partial").touch()
    (tmp_path / "checkpoints" / "step_000100").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000020").mkdir()
    (tmp_path / "checkpoints" / "step_000020" / "checkpoint.json").touch()
    (tmp_path / "checkpoints" / ".step_000030.partial").mkdir()
    (tmp_path / "checkpoints" / ".step_000030.partial" / "checkpoint.json").touch()
    run = open_run(tmp_path)
    assert run.rollout_steps() == [1]
    assert run.checkpoints() == {20: tmp_path / "checkpoints" / "step_000020"}


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_resuming_moves_every_record_after_the_step_aside(tmp_path):
    writer = new_run(tmp_path)
    writer.write_evaluation(0, {"data": "a"})
    for step in (1, 2, 3):
        writer.write_metrics(step, {"a": 0.1 * step, "b": math.nan})
        writer.write_rollouts(step, rollout_columns(step))
        writer.write_evaluation(step, {"data": "a"})
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "a"')
    moved = move_aside(tmp_path, 2)
    assert str(moved) == "1 file of rollouts, 1 evaluation, 2 rows of metrics"
    run, aside = open_run(tmp_path), open_run(moved.folder)
    assert moved.folder.parent == tmp_path / "superseded"
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True) == before[:2]
    assert [row["step"] for row in run.evaluations()] == [0, 1, 2]
    assert run.rollout_steps() == [1, 2]
    # Where it went it reads as a run, with the settings that it was made with.
    assert (moved.folder / "metrics.jsonl").read_bytes() == before[2] + b'{"step": 4, "a"'
    assert [row["step"] for row in aside.metrics() + aside.evaluations()] == [3, 3]
    assert aside.rollouts()["step"].to_pylist() == [3] * 4
    assert aside.config == run.config and aside.environment == run.environment
    writer.write_metrics(3, {"a": 0.3})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert move_aside(tmp_path, 3) is None
    move_aside(tmp_path, 0)
    assert (run.metrics(), run.rollout_steps()) == ([], [])
    assert [row["step"] for row in run.evaluations()] == [0]
    assert len(list((tmp_path / "superseded").iterdir())) == 2


def test_a_kill_while_later_records_are_moved_aside_loses_none_of_them(tmp_path, monkeypatch):
    """After every single rename a run goes on from its newest checkpoint, beside which all that belongs to it lies."""
    rename = os.rename
    for killed_after in range(12):
        folder = tmp_path / str(killed_after)
        writer = new_run(folder)
        for step in range(1, 7):
            writer.write_metrics(step, {"a": step})
            writer.write_rollouts(step, rollout_columns(step))
            writer.write_evaluation(step, {"data": "a"})
            if step % 2 == 0:
                (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
                (folder / "checkpoints" / f"step_{step:06d}" / "checkpoint.json").touch()
        calls = []

        def dying(source, target, calls=calls, killed_after=killed_after):
            if len(calls) == killed_after:
                raise KeyboardInterrupt
            calls.append(target)
            rename(source, target)

        monkeypatch.setattr(os, "rename", dying)
        monkeypatch.setattr(os, "replace", dying)
        killed = False
        try:
            move_aside(folder, 2)
        except KeyboardInterrupt:
            killed = True
        monkeypatch.undo()
        assert killed == (killed_after < 8)  # two checkpoints, four steps of rollouts, two files of rows
        run = open_run(folder)
        newest = max(run.checkpoints())
        move_aside(folder, newest)  # what --resume auto does
        assert [row["step"] for row in run.metrics()] == list(range(1, newest + 1))
        assert run.rollout_steps() == list(range(1, newest + 1))
        found = [open_run(path) for path in (folder / "superseded").iterdir()] + [run]
        assert {row["step"] for one in found for row in one.metrics()} == set(range(1, 7))
        assert sorted(step for one in found for step in one.rollout_steps()) == list(range(1, 7))
        assert sorted(step for one in found for step in one.checkpoints()) == [2, 4, 6]


def test_every_start_is_on_record(tmp_path):
    writer = new_run(tmp_path)
    environment = {"python": "4.0", "world_size": 2}
    writer.write_description(config_yaml="steps: 9\n", ds_config={}, environment=environment, step=7)
    first, second = open_run(tmp_path).starts()
    assert (first["step"], first["world_size"]) == (0, 1)
    assert (second["step"], second["python"]) == (7, "4.0")
    assert abs(datetime.fromisoformat(second["time"]).timestamp() - time.time()) < 100
    assert open_run(tmp_path).environment == second


def test_a_full_disk_leaves_whole_files_and_is_said_with_their_names(tmp_path):
    """A limit on a file's size stands for the disk: both take what fits, and of a row say so by the number of bytes."""
    code = (
        "import resource, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from clipo_ds.records import RunWriter\n"
        "from test_records import rollout_columns\n"
        "writer = RunWriter(Path(sys.argv[1]))\n"
        "writer.write_metrics(1, {'a': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "for write in (\n"
        "    lambda: writer.write_metrics(2, {'a': 'x' * 100}), lambda: writer.write_rollouts(2, rollout_columns(2))\n"
        "):\n"
        "    try: write()\n"
        "    except OSError as error: print(error.filename, error.errno)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rollouts = tmp_path / "rollouts" / "step_000002.parquet"
    assert said == [f"{tmp_path}/metrics.jsonl {errno.ENOSPC}", f"{rollouts} {errno.EFBIG}"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 1}\n'
    assert list((tmp_path / "rollouts").iterdir()) == []


# -- reading while another process writes ------------------------------------------------------------------------------

WRITER = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from clipo_ds.records import RunWriter
from clipo_ds.superseded import move_aside
from test_records import new_run, rollout_columns
path = Path(sys.argv[3])
writer = new_run(path)
for step in range(1, 121):
    writer.write_rollouts(step, rollout_columns(step, num=4, size=256))
    writer.write_metrics(step, {f"metric/{i}": float(step) for i in range(200)})
    writer.write_evaluation(step, {"data": "a", "accuracy": float(step)})
    if step == 60:
        move_aside(path, 40)
"""


def test_a_reader_finds_whole_things_only_while_another_process_writes(tmp_path):
    root = Path(__file__).parents[1]
    folder = tmp_path / "run"
    command = [sys.executable, "-c", WRITER, str(root), str(root / "tests"), str(folder)]
    num_seen = set()
    with subprocess.Popen(command) as process:
        while process.poll() is None or not num_seen:
            if not (folder / "config.yaml").exists():
                assert process.poll() in (None, 0)
                time.sleep(0.01)
                continue
            run = open_run(folder)
            rows = run.metrics()
            assert all(len(row) == 201 and set(row.values()) == {float(row["step"])} for row in rows)
            assert all(row["accuracy"] == row["step"] for row in run.evaluations())
            table = run.rollouts(columns=["step", "reward", "embedding"])
            assert table.num_rows % 4 == 0
            assert table["reward"].to_pylist() == table["step"].to_pylist()
            assert (embeddings(table) == table["step"].to_numpy()[:, None]).all()
            num_seen.add(len(rows))
    assert process.returncode == 0
    assert len(num_seen) > 5, "the reader was too slow to read meanwhile"
    assert [row["step"] for row in open_run(folder).metrics()] == [*range(1, 41), *range(61, 121)]


def test_records_need_no_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'deepspeed', 'datasets'): sys.modules[name] = None\n"
        "import clipo_ds.records, clipo_ds.types, clipo_ds.sources\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_rollout_files_are_compressed(tmp_path):
    new_run(tmp_path).write_rollouts(1, rollout_columns(1))
    file = pq.ParquetFile(tmp_path / "rollouts" / "step_000001.parquet")
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
