"""Views beside a run that trains: what waits for the browser, and what comes as steps land."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from written_run import write_run

from clipo_ds.viz import cluster_view, interact
from clipo_ds.viz.cluster_figures import separation_figure
from clipo_ds.viz.cluster_view import ClusterExplorer
from clipo_ds.viz.dynamics_view import DynamicsView, GroupView
from clipo_ds.viz.frames import metrics_frame


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("viz") / "run")


def test_the_explorers_numbers_wait_until_a_browser_has_drawn_the_picture(run, monkeypatch):
    monkeypatch.setattr(interact, "MAX_DRAWING_S", 60.0)

    async def open_and_draw() -> ClusterExplorer:
        view = ClusterExplorer(run)
        await asyncio.sleep(0.05)
        assert view.numbers is None
        threading.Thread(target=setattr, args=(view.figure, "_drawn", True)).start()  # as JupyterLab's subshell says it
        await asyncio.wait_for(view._task, 20)
        return view

    title = asyncio.run(open_and_draw()).numbers.layout.title.text
    assert title.startswith("Step 3: ") and "figures lie outside" in title


def test_the_explorers_numbers_come_also_where_no_browser_draws(run, monkeypatch):
    monkeypatch.setattr(interact, "MAX_DRAWING_S", 0.05)

    async def open_unseen() -> ClusterExplorer:
        view = ClusterExplorer(run)
        await asyncio.wait_for(view._task, 20)
        return view

    assert asyncio.run(open_unseen()).numbers is not None


def test_numbers_of_a_step_that_the_reader_has_left_meanwhile_are_not_shown(run, monkeypatch):
    view = ClusterExplorer(run)
    compute = cluster_view.separation_of_step

    def compute_slowly(*arguments):
        monkeypatch.setattr(cluster_view, "separation_of_step", compute)
        view._step.value = 1
        return compute(*arguments)

    monkeypatch.setattr(cluster_view, "separation_of_step", compute_slowly)
    view._step.value = 2
    of_1, of_2 = (list(separation_figure(view._scores[step], step).data[-1].x) for step in (1, 2))
    assert list(view.numbers.data[-1].x) == of_1 != of_2


def test_numbers_are_computed_where_the_slider_rests_and_not_on_its_way(run, monkeypatch):
    monkeypatch.setattr(interact, "MAX_DRAWING_S", 0.05)
    monkeypatch.setattr(cluster_view, "NUMBERS_AFTER_S", 0.2)

    async def move() -> ClusterExplorer:
        view = ClusterExplorer(run)
        await asyncio.wait_for(view._task, 20)
        for step in (1, 2, "all", 1):
            view._step.value = step
            await asyncio.sleep(0.02)
        assert list(view._scores) == [3]
        await asyncio.sleep(0.4)
        return view

    view = asyncio.run(move())
    assert list(view._scores) == [3, 1]
    assert list(view.numbers.data[-1].x) == list(separation_figure(view._scores[1], 1).data[-1].x)


def test_the_dynamics_follow_a_run_that_is_being_written(tmp_path):
    whole = write_run(tmp_path / "whole", steps=3)
    path = write_run(tmp_path / "run", steps=2, config={"steps": 3})

    async def watch() -> DynamicsView:
        view = DynamicsView(path, every_s=0.05)
        assert "running" in view.badge.value
        await asyncio.sleep(0.2)
        os.replace(whole / "rollouts" / "step_000003.parquet", path / "rollouts" / "step_000003.parquet")
        os.replace(whole / "metrics.jsonl", path / "metrics.jsonl")
        for _ in range(100):
            await asyncio.sleep(0.05)
            if "finished" in view.badge.value:
                break
        return view

    view = asyncio.run(watch())
    assert "finished" in view.badge.value
    assert view.plots[2].layout.title.subtitle.text == "36 valid anchors of 72 rollouts"
    assert metrics_frame(view.run).index.tolist() == [1, 2, 3]


def test_the_clusters_and_the_group_take_in_steps_as_they_land(tmp_path, monkeypatch):
    monkeypatch.setattr(interact, "MAX_DRAWING_S", 0.05)
    whole = write_run(tmp_path / "whole", steps=4)
    path = write_run(tmp_path / "run", steps=2, config={"steps": 4})

    def land(step: int) -> None:
        name = f"rollouts/step_{step:06d}.parquet"
        os.replace(whole / name, path / name)

    async def watch() -> tuple[ClusterExplorer, GroupView]:
        views = ClusterExplorer(path, every_s=0.05), GroupView(path, every_s=0.05)
        land(3)
        while views[0].table.steps != [1, 2, 3] or views[1].table.steps != [1, 2, 3]:
            await asyncio.sleep(0.02)
        assert [view._step.value for view in views] == [3, 2]  # the picture moves on, the group being read stays
        assert views[0].figure.layout.title.text.startswith("Step 3:")
        views[0]._step.value = 1
        land(4)
        os.replace(whole / "metrics.jsonl", path / "metrics.jsonl")
        await asyncio.wait_for(asyncio.gather(*(view._task for view in views)), 20)
        return views

    clusters, group = asyncio.run(watch())
    assert clusters._step.value == 1  # a step that was chosen stays
    assert clusters._step.options == (1, 2, 3, 4, "all") and group._step.options == (1, 2, 3, 4)
    assert clusters.figure.layout.title.text.startswith("Step 1:")
    assert "of 96 rollouts" in clusters.figure.layout.title.subtitle.text
    assert len(list((path / "viz").iterdir())) == 1  # a layout of steps that are soon more is not kept


def test_the_dynamics_say_stale_when_a_run_has_stopped_writing(tmp_path):
    path = write_run(tmp_path / "run", steps=2, config={"steps": 9})
    for file in path.glob("*.*"):
        os.utime(file, (1, 1))
    assert "stale" in DynamicsView(path).badge.value


def test_following_leaves_time_to_others_and_never_falls_far_behind(monkeypatch):
    run, seen, waits = SimpleNamespace(rollout_steps=lambda: list(range(len(waits) + 1))), [], []
    costs = iter([0.1, 0.5, 60.0])

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, cost) for cost in costs))
    monkeypatch.setattr(interact, "run_state", lambda run: SimpleNamespace(word="finished" if len(waits) == 3 else ""))
    monkeypatch.setattr(interact, "time", SimpleNamespace(monotonic=lambda: next(clock, 0.0)))
    monkeypatch.setattr(interact, "asyncio", SimpleNamespace(sleep=sleep))
    asyncio.run(interact.follow_steps(run, [], lambda: seen.append(len(waits)), 2.0))
    assert seen == [0, 1, 2, 3]  # the last step of a finished run too
    assert waits == pytest.approx([2.0, 4.5, interact.MAX_WAIT_S])
