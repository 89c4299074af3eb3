"""What is shown of a run in progress: curves, badge, rollouts and evaluations, on folders that tests write."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from clipo_ds.records import RunWriter
from clipo_ds.types import InputError
from clipo_ds.viz.live import BeforeAfter, LiveRun
from clipo_ds.viz.progress import before_after
from clipo_ds.viz.tail import JsonLines, last_row


def metrics(accuracy: float | None) -> dict[str, float | None]:
    return {
        "accuracy/mean": accuracy, "process/consistent_among_correct": 1.0, "contrastive/loss": -0.5, "time/step": 2.0,
    }  # fmt: skip


def evaluation(data: str, accuracy: float) -> dict[str, object]:
    return {
        "data": data, "accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1,
        "process_consistent_among_correct": None, "num_problems": 8,
    }  # fmt: skip


@pytest.fixture
def writer(tmp_path):
    made = RunWriter.create(tmp_path / "run", config_yaml="steps: 4\n", ds_config={}, environment={})
    made.write_evaluation(0, evaluation("sums", 0.25))
    return made


def rollouts() -> dict[str, list[object]]:
    return {
        "group": [0, 0], "prompt": ["1+1:"] * 2, "response": ["1+1=3;#2", "<b>&"], "ground_truth": ["2"] * 2,
        "correct": [True, False], "process_consistent": [False, None], "reward": [1.0, 0.0],
        "advantage": [1.0, -1.0], "num_tokens": [8, 4], "truncated": [False, False],
    }  # fmt: skip


def test_whole_lines_are_read_once_and_a_torn_one_when_it_is_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = JsonLines(file)
    assert not lines.read() and lines.rows == [] and last_row(file) is None
    file.write_text('{"step": 1}\n{"st')
    assert lines.read() and lines.rows == [{"step": 1}]
    assert last_row(file) == {"step": 1}
    assert not lines.read()
    with file.open("a") as more:
        more.write('ep": 2}\n')
    assert lines.read() and [row["step"] for row in lines.rows] == [1, 2]


def test_file_that_a_resumed_run_put_in_its_place_is_read_anew(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')
    lines = JsonLines(file)
    lines.read()
    other = tmp_path / "other"
    other.write_text('{"step": 1}\n{"step": 3}\n')
    os.replace(other, file)
    assert lines.read() and [row["step"] for row in lines.rows] == [1, 3]


def test_view_follows_a_run_that_somebody_else_started(writer):
    view = LiveRun(writer.path)
    assert "running" in view._badge.value and view._stop.layout.display == "none"
    assert len(view.figure.data) == 3 + 2  # curves, and the test set in the panels of accuracy and process
    writer.write_rollouts(1, rollouts())
    writer.write_metrics(1, metrics(0.5))
    writer.write_metrics(2, metrics(None))
    assert view.refresh().step == 2
    accuracy = view.figure.data[0]
    assert accuracy.x.tolist() == [1, 2] and accuracy.y[0] == 0.5 and accuracy.y[1] != accuracy.y[1]
    assert "step 2 of 4" in view._message.value and "2.0 s a step, about 4 s left" in view._message.value
    assert "right answer, wrong process" in view._rollouts.value and "&lt;b&gt;&amp;" in view._rollouts.value
    writer.write_metrics(3, metrics(0.5))
    writer.write_metrics(4, metrics(0.75))
    assert view.refresh().is_over and "finished" in view._badge.value


def test_run_without_a_word_for_long_is_called_stale(writer):
    writer.write_metrics(1, metrics(0.5))
    long_ago = time.time() - 3600
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        os.utime(writer.path / name, (long_ago, long_ago))
    view = LiveRun(writer.path)
    assert "stale" in view._badge.value and "nothing new for 60 min" in view._message.value


def test_view_keeps_up_by_itself_and_leaves_the_kernel_free(writer):
    async def kernel() -> int:
        view = LiveRun(writer.path, every_s=0.01)
        writer.write_metrics(1, metrics(0.5))
        for _ in range(500):
            await asyncio.sleep(0.01)
            if len(view.figure.data[0].x):
                break
        view.close()
        return len(view.figure.data[0].x)

    assert asyncio.run(kernel()) == 1


def test_what_goes_wrong_while_following_is_told_in_the_view(writer):
    async def kernel() -> str:
        view = LiveRun(writer.path, every_s=0.01)
        with (writer.path / "metrics.jsonl").open("a") as file:
            file.write("not json\n")
        for _ in range(500):
            await asyncio.sleep(0.01)
            if view._task.done():
                break
        await asyncio.sleep(0)
        return view._message.value

    assert "This view follows the run no longer" in asyncio.run(kernel())


def test_folder_without_a_run_is_refused(tmp_path):
    for view in (LiveRun, BeforeAfter):
        with pytest.raises(InputError, match="`run` must be a run folder"):
            view(tmp_path)


def test_test_sets_get_their_traces_when_their_first_evaluation_comes(writer):
    (writer.path / "evaluations.jsonl").unlink()
    view = LiveRun(writer.path)
    assert len(view.figure.data) == 3
    writer.write_evaluation(0, evaluation("sums", 0.25))
    writer.write_evaluation(2, evaluation("sums", 0.5))
    view.refresh()
    assert [trace.name for trace in view.figure.data[3:]] == ["test set sums"] * 2
    assert view.figure.data[3].x.tolist() == [0, 2]
    # what a page that is loaded anew starts from
    assert len(view.figure._widget_data) == 5


def test_before_and_after_are_matched_by_test_set():
    before = [evaluation("sums", 0.25), evaluation("<gone>", 0.5)]
    shown = before_after(before, [evaluation("sums", 0.75)], 7)
    assert "after step 7" in shown and "25.0% [15.0%, 35.0%]" in shown and "75.0% [65.0%, 85.0%]" in shown
    assert "none to judge" in shown and "gone" not in shown


def test_run_that_evaluated_itself_last_is_not_evaluated_again(recorded_run):
    async def kernel() -> str:
        view = BeforeAfter(recorded_run)
        await view._task
        return view._view.value

    assert "Before training and after step 6" in asyncio.run(kernel())


def test_run_without_a_checkpoint_says_so(writer):
    async def kernel() -> str:
        view = BeforeAfter(writer.path)
        await view._task
        return view._view.value

    assert asyncio.run(kernel()) == "the run has no checkpoint: there is nothing to compare"
