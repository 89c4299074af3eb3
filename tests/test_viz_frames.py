"""A run folder as tables, and its rollouts as HTML: what is read, what is left out, and that no text is trusted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_run import FALSE_STEP, tear_newest, write_run

from clipo_ds.types import InputError
from clipo_ds.viz.dynamics_figures import decomposition_figure
from clipo_ds.viz.frames import (
    CELLS,
    as_run,
    cells,
    chosen_run,
    find_runs,
    metrics_frame,
    open_rollouts,
    run_state,
)
from clipo_ds.viz.reading import mark_false_equations, neighbours, rollout_html, siblings, suspects, suspects_html


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("viz") / "run")


def test_every_rollout_has_a_row_and_its_cell(run):
    table = open_rollouts(run)
    assert table.steps == [1, 2, 3]
    assert len(table.frame) == 3 * 4 * 6
    # In each of 12 groups: 2 right and clean, 1 right with a false step, 3 wrong.
    assert table.frame["cell"].value_counts().to_dict() == dict(zip(CELLS, (24, 12, 0, 0, 36, 0), strict=True))
    assert table.frame["prompt"].unique().tolist() == [100, 101, 102, 103]
    assert table.frame["other_reward"].abs().max() == 0
    assert table.notes == ()


def test_the_six_cells_are_answer_times_process():
    correct = pd.Series([True, True, True, False, False, False])
    process = pd.Series([True, False, None] * 2, dtype="boolean")
    assert list(cells(correct, process)) == list(CELLS)


def test_embeddings_and_texts_come_in_the_order_of_the_rows(run):
    table = open_rollouts(run)
    rows = np.array([50, 3, 27])
    assert table.embeddings(rows).dtype == np.float16
    np.testing.assert_array_equal(table.embeddings(rows), table.embeddings()[rows])
    texts = table.texts(rows)
    assert texts.index.tolist() == rows.tolist()
    assert texts["prompt"].tolist() == [f"2+2: problem {row % 24 // 6} <b>" for row in rows]


def test_prompts_are_told_by_their_texts_where_they_have_no_number(tmp_path):
    run = as_run(write_run(tmp_path / "a"))
    for file in (run.path / "rollouts").glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["prompt_uid", "outcome_reward"]), file)
    table = open_rollouts(run)
    assert table.frame["prompt"].nunique() == 4
    assert table.prompts().tolist() == [f"2+2: problem {n} <b>" for n in range(4)]
    assert table.frame["outcome_reward"].unique().tolist() == [1.0, 0.0]  # the reward without its contrastive part


def test_steps_with_other_columns_stand_in_their_place(tmp_path):
    path = write_run(tmp_path / "a")
    before = open_rollouts(path).frame
    file = path / "rollouts" / "step_000002.parquet"
    table = pq.read_table(file)
    other = table.append_column("dropped", pa.array([True] * len(table))).select([*table.column_names[::-1], "dropped"])
    pq.write_table(other, file)
    frame = open_rollouts(path).frame
    assert frame["dropped"].tolist() == (frame["step"] == 2).tolist()
    pd.testing.assert_frame_equal(frame[before.columns].drop(columns="dropped"), before.drop(columns="dropped"))


def test_a_torn_newest_step_is_left_out_with_a_sentence(tmp_path):
    run = write_run(tmp_path / "a")
    tear_newest(run)
    table = open_rollouts(run)
    assert table.steps == [1, 2]
    assert table.notes[0].startswith("Step 3 is left out: its file is not whole yet")


def test_a_torn_step_in_the_middle_is_an_error(tmp_path):
    run = write_run(tmp_path / "a")
    (run / "rollouts" / "step_000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="must be a whole parquet file"):
        open_rollouts(run)


def test_runs_without_rollouts_or_embeddings_say_so(tmp_path):
    empty = write_run(tmp_path / "empty", steps=0)
    with pytest.raises(InputError, match=r"must have rollouts, got .*: no step has been recorded yet"):
        open_rollouts(empty)
    plain = write_run(tmp_path / "plain", embeddings=False)
    with pytest.raises(InputError, match=r"must have embeddings, .* train with logging.save_embeddings true"):
        open_rollouts(plain).embeddings()


def test_the_run_is_the_one_named_or_the_newest(tmp_path, monkeypatch):
    monkeypatch.delenv("CLIPO_DS_RUN", raising=False)
    with pytest.raises(InputError, match="there is no run under"):
        chosen_run(tmp_path)
    old, new = write_run(tmp_path / "z", steps=1), write_run(tmp_path / "comparison" / "a", steps=1)
    os.utime(old / "config.yaml", (1, 1))
    write_run(old / "superseded" / "step_000000-20261128-081500", steps=1)  # moved aside by --resume
    assert find_runs(tmp_path) == [old, new]
    assert find_runs(old) == []
    assert chosen_run(tmp_path) == new
    monkeypatch.setenv("CLIPO_DS_RUN", str(old))
    assert chosen_run(tmp_path) == old


def test_a_run_that_stopped_writing_is_stale(tmp_path):
    run = write_run(tmp_path / "a", config={"steps": 10}, steps=2)
    assert run_state(as_run(run)).word == "running"
    for file in run.glob("*.*"):
        os.utime(file, (time.time() - 100,) * 2)
    state = run_state(as_run(run))
    assert (state.word, state.step, state.num_steps) == ("stale", 2, 10)
    assert 95 < state.silent_s < 200
    assert run_state(as_run(write_run(tmp_path / "b"))).word == "finished"


def test_rewards_are_shown_part_by_part_times_their_weights(tmp_path):
    functions = [{"function": "mine.py:short", "weight": 0.1}, {"function": "mine.py:overlong", "weight": 2.0}]
    run = as_run(write_run(tmp_path / "a", config={"reward": {"functions": functions}}))
    for file in (run.path / "rollouts").glob("*.parquet"):
        table = pq.read_table(file)
        names = ("overlong", "short", "mine.py:overlong")
        for name, value in zip(names, (-0.25, 3.0, 0.5), strict=True):
            table = table.append_column(f"reward/{name}", pa.array([value] * len(table)))
        reward = table["reward"].to_numpy() - 0.25 + 0.3 + 1.0
        at = table.schema.get_field_index("reward")
        pq.write_table(table.set_column(at, "reward", pa.array(reward.astype(np.float32))), file)
    table = open_rollouts(run)
    assert table.reward_parts == ["weighted/overlong", "weighted/short", "weighted/mine.py:overlong"]
    np.testing.assert_allclose(table.frame[table.reward_parts].iloc[0], [-0.25, 0.3, 1.0])
    assert not table.frame["other_reward"].any()
    page = rollout_html(table, 0)
    assert (
        "reward 2.150 = outcome 1.000 + contrastive 0.100 + overlong -0.250 + short 0.300 + mine.py:overlong 1.000"
        in page
    )
    bars = decomposition_figure(table).data
    assert [bar.name for bar in bars] == ["outcome", "contrastive", "overlong", "short", "mine.py:overlong"]
    assert len({bar.marker.color for bar in bars}) == 5


def test_what_was_not_trained_on_is_no_part_of_the_mean_rewards(tmp_path):
    run = as_run(write_run(tmp_path / "a"))
    for file in (run.path / "rollouts").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column("dropped", table["correct"]), file)
    outcome = decomposition_figure(open_rollouts(run)).data[0]
    assert (outcome.name, set(outcome.y)) == ("outcome", {0.0})


def test_metrics_are_numbers_by_step(run):
    frame = metrics_frame(as_run(run))
    assert frame.index.tolist() == [1, 2, 3]
    assert frame["contrastive/loss"].tolist() == [1.0, 0.5, pytest.approx(1 / 3)]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_false_equations_are_marked_and_everything_is_escaped():
    marked = mark_false_equations("<script>alert()</script>\n3 + 4 = 8.\nAnd & then 2 + 2 = 4.")
    assert "<script" not in marked
    assert marked.count("<mark") == 1
    assert '<mark title="stated 8, is 7">3 + 4 = 8</mark>' in marked
    assert "&amp; then 2 + 2 = 4." in marked
    marked = mark_false_equations("Total = 3 + 4\nTotal = 8. So 2(x + 1) = 2x + 3. And 5/0 = 1.")
    assert '<mark title="stated 8, is 7">3 + 4\nTotal = 8</mark>' in marked
    assert '<mark title="is never true">2(x + 1) = 2x + 3</mark>' in marked
    assert '<mark title="has no value">5/0 = 1</mark>' in marked


def test_a_rollout_is_shown_with_its_escaped_prompt_and_its_false_step(run):
    table = open_rollouts(run)
    row = int(np.flatnonzero(table.frame["cell"] == CELLS[1])[0])
    page = rollout_html(table, row)
    assert "problem 0 &lt;b&gt;" in page
    assert "<mark" in page
    assert "1 of 2 checked equations false" in page
    assert "reward 0.500 = outcome 1.000 + contrastive -0.500" in page


def test_a_verdict_that_no_false_equation_explains_is_said_to_be_the_tasks(run):
    table = open_rollouts(run)
    row = int(np.flatnonzero(table.frame["cell"] == CELLS[0])[0])
    assert "verifier" not in rollout_html(table, row)
    table.frame.loc[row, "process_consistent"] = False
    page = rollout_html(table, row)
    assert "0 of 1 checked equations false; the task's own verifier rejects the steps" in page


def test_neighbours_are_nearest_by_cosine():
    vectors = np.array([[1, 0], [0, 1], [2, 0.1], [-1, 0]], np.float16)
    found = neighbours(vectors, np.array([10, 11, 12, 13]), 10, count=2)
    # Cosines with [1, 0]: 0, 2 / sqrt(4.01) = 0.9988, -1.
    assert [row for row, _ in found] == [12, 11]
    assert found[0][1] == pytest.approx(0.9988, abs=1e-3)


def test_siblings_are_the_rest_of_the_group(run):
    assert siblings(open_rollouts(run), 7).tolist() == [6, 8, 9, 10, 11]


def test_suspects_are_right_answers_with_a_false_step(run):
    table = open_rollouts(run)
    found = suspects(table, limit=5)
    assert len(found) == 5
    assert set(found["response"]) == {FALSE_STEP}
    assert found["num_wrong"].tolist() == [1] * 5
    assert found["advantage"].is_monotonic_decreasing
    assert "12 of 36 right answers have a false step" in suspects_html(table)
