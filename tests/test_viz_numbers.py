"""Projections that stay put, separation beside its baselines, means over seeds: hand-worked values and edge cases."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score, silhouette_samples
from threadpoolctl import threadpool_info, threadpool_limits
from written_run import write_responses, write_run

from clipo_ds.types import InputError
from clipo_ds.viz import projections
from clipo_ds.viz import separation as separation_module
from clipo_ds.viz.cluster_figures import separation_course_figure
from clipo_ds.viz.compare_figures import curves_figure
from clipo_ds.viz.comparison import curves, evaluation_summary, mean_with_interval, open_arms
from clipo_ds.viz.frames import open_rollouts
from clipo_ds.viz.problems import compare_problems, responses_to
from clipo_ds.viz.projections import project, subsample, turned_like
from clipo_ds.viz.separation import FIGURES, probe_auc, separation, separation_course, silhouettes
from clipo_ds.viz.theme import SERIES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("viz") / "run")


# -- projections -------------------------------------------------------------------------------------------------------


def test_points_are_fitted_once_and_kept_beside_the_run(run, monkeypatch):
    table = open_rollouts(run)
    first = project(table)
    assert first.points.shape == (72, 2)
    assert first.points.dtype == np.float32
    assert first.explained[0] >= first.explained[1] > 0
    assert first.note == "72 of 72 rollouts"
    assert [file.name.split("-")[0] for file in (run / "viz").iterdir()] == ["pca"]
    monkeypatch.setattr("clipo_ds.viz.projections._lay_out", None)  # must not be called again
    again = project(table)
    np.testing.assert_array_equal(again.points, first.points)
    assert again.explained == pytest.approx(first.explained)


def test_other_embeddings_are_not_taken_from_the_cache(tmp_path):
    one = project(open_rollouts(write_run(tmp_path / "a")))
    other = project(open_rollouts(write_run(tmp_path / "b", seed=1)))
    assert not np.array_equal(one.points, other.points)


def test_centring_takes_away_what_a_group_has_in_common(tmp_path):
    table = open_rollouts(write_run(tmp_path / "a"))
    points = project(table, centre="group").points
    for step in table.steps:
        for group in range(4):
            own = points[table.rows_of(step, group)]
            np.testing.assert_allclose(own.mean(0), 0, atol=1e-3)


def test_a_subsample_is_whole_groups_of_the_same_prompts_in_every_step(tmp_path):
    table = open_rollouts(write_run(tmp_path / "a", groups=10))
    rows = subsample(table, 90)  # half of 3 steps x 10 groups x 6
    frame = table.frame.iloc[rows]
    assert len(rows) == 90
    assert (frame.groupby(["step", "group"]).size() == 6).all()
    assert frame.groupby("step")["prompt"].unique().apply(lambda prompts: tuple(sorted(prompts))).nunique() == 1
    assert project(table, max_points=90).note == "90 of 180 rollouts (whole groups, drawn evenly over the steps)"
    assert frame["step"].nunique() == 3
    assert len(subsample(table, 1)) == 18  # one group a step at least


def test_axes_of_a_longer_run_point_the_way_they_did(run):
    earlier = project(open_rollouts(run, [1, 2]))
    mirrored = replace(earlier, points=earlier.points * np.array([-1, 1], np.float32))
    assert np.array_equal(turned_like(mirrored, earlier).points, earlier.points)


@pytest.mark.parametrize(("num", "size", "count"), [(400, 20, 2), (12, 30, 10), (3, 30, 2)])
@pytest.mark.parametrize("narrow", [projections.NARROW, 0], ids=["numpy", "scikit-learn"])
def test_components_are_those_of_a_singular_value_decomposition(monkeypatch, num, size, count, narrow):
    monkeypatch.setattr(projections, "NARROW", narrow)
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(num, size)) * np.linspace(3, 1, size) + 5).astype(np.float32)
    left, values, right = np.linalg.svd((vectors - vectors.mean(0)).astype(np.float64), full_matrices=False)
    largest = np.abs(right[:count]).argmax(1)
    expected = left[:, :count] * values[:count] * np.sign(right[np.arange(count), largest])
    points, shares = projections._principal(vectors, count, seed=0)
    np.testing.assert_allclose(points, expected, atol=1e-3)
    np.testing.assert_allclose(shares, values[:count] ** 2 / (values**2).sum(), atol=1e-5)


@pytest.mark.parametrize("work", ["components", "probes", "silhouettes"])
def test_linear_algebra_takes_one_thread_and_leaves_the_rest_as_it_was(monkeypatch, work):
    owner, name = {
        "components": (np.linalg, "eigh"),
        "probes": (Ridge, "fit"),
        "silhouettes": (separation_module, "silhouettes"),
    }[work]
    compute, seen = getattr(owner, name), set()

    def watched(*arguments, **named):
        seen.update(threads_of_linear_algebra())
        return compute(*arguments, **named)

    def threads_of_linear_algebra() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    monkeypatch.setattr(owner, name, watched)
    vectors = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    labels, groups = np.arange(80) % 2 == 0, np.arange(80) // 8
    with threadpool_limits(2, "blas"):
        if work == "components":
            projections._principal(vectors, 2, seed=0)
        else:
            separation(vectors, labels, np.full(80, -1), groups)
        assert set(threads_of_linear_algebra()) == {2}
    assert seen == {1}


def test_equal_embeddings_lie_in_one_place():
    equal = np.full((7, 5), 0.1, np.float32)
    assert (equal - equal.mean(0)).any()  # their mean is not quite what they are
    points, shares = projections._lay_out(equal, "PCA", seed=0)
    assert not points.any()
    assert shares == ()


def test_an_embedding_that_is_not_finite_is_left_out(tmp_path):
    path = write_run(tmp_path / "a", steps=1)
    whole = project(open_rollouts(path)).rows
    file = path / "rollouts" / "step_000001.parquet"
    rollouts = pq.read_table(file)
    place = rollouts.column_names.index("embedding")
    column = rollouts.schema.field(place)
    vectors = np.stack(rollouts["embedding"].to_numpy())
    vectors[0, 0], vectors[2, :2] = np.nan, (np.inf, -np.inf)
    pq.write_table(rollouts.set_column(place, column, pa.array(list(vectors), column.type)), file)
    assert project(open_rollouts(path)).rows.tolist() == [row for row in whole if row not in (0, 2)]


@pytest.mark.parametrize(("groups", "group_size"), [(1, 1), (1, 3)])
@pytest.mark.parametrize("method", ["PCA", "PaCMAP"])
def test_a_few_points_have_places_too(tmp_path, groups, group_size, method):
    table = open_rollouts(write_run(tmp_path / "a", steps=1, groups=groups, group_size=group_size, only_right=True))
    points = project(table, method).points
    assert points.shape == (groups * group_size, 2)
    assert np.isfinite(points).all()


def test_a_library_that_is_not_there_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(InputError, match=r"pip install umap-learn.*PCA needs nothing more"):
        project(open_rollouts(run), "UMAP")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["PaCMAP", "UMAP", "t-SNE"])
def test_nonlinear_methods_keep_well_separated_classes_apart(tmp_path, method):
    table = open_rollouts(write_run(tmp_path / "a", groups=10, steps=1, size=4))
    vectors = np.repeat(np.eye(4)[[0, 1]], 30, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(60, 4))
    table = type(table)(table.run, table.frame)
    object.__setattr__(table, "embeddings", lambda rows=None: vectors.astype(np.float16)[rows])
    points = project(table, method, use_cache=False).points
    assert silhouette_samples(points, np.repeat([0, 1], 30)).mean() > 0.5


def test_unknown_choices_are_refused(run):
    table = open_rollouts(run)
    with pytest.raises(InputError, match="`method` must be of PCA, PaCMAP, UMAP, t-SNE, got 'pca'"):
        project(table, "pca")
    with pytest.raises(InputError, match="`centre` must be of none, group, got 'x'"):
        project(table, centre="x")


# -- separation --------------------------------------------------------------------------------------------------------


def test_silhouettes_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 5))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    labels = rng.random((4, 30)) < 0.4
    expected = [silhouette_samples(distances, label, metric="precomputed") for label in labels]
    np.testing.assert_allclose(silhouettes(distances, labels), expected, atol=1e-12)


def test_similarities_within_groups_worked_by_hand():
    # Two groups. In the first, right answers are [1, 0] and [0, 1], the wrong one is [1, 0]: cosine 0 between the right
    # ones, 1 and 0 to the wrong one. In the second a right and a wrong one of opposite direction: -1.
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, -1]], float)
    correct = np.array([True, True, False, True, False])
    scores = separation(vectors, correct, np.full(5, -1), np.array([7, 7, 7, 9, 9]))
    assert scores["positive_similarity"].value == pytest.approx(0)
    assert scores["negative_similarity"].value == pytest.approx((1 + 0 - 1) / 3)
    assert scores["margin"].value == pytest.approx(0)


def test_the_probe_finds_a_direction_and_its_baseline_is_chance():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 8)
    correct = rng.random(320) < 0.5
    vectors = rng.normal(size=(320, 16))
    noise = separation(vectors, correct, correct.astype(int), group)
    assert noise["probe_correct"].value == pytest.approx(0.5, abs=0.1)
    vectors[:, 0] += np.where(correct, 2.0, -2.0)
    found = separation(vectors, correct, correct.astype(int), group)
    assert found["probe_correct"].value > 0.95
    for scores in (noise, found):
        assert scores["probe_correct"].baseline == pytest.approx(0.5, abs=0.05)
        assert scores["silhouette_group"].baseline == pytest.approx(0.0, abs=0.03)
    assert found["silhouette_group"].value > found["silhouette_group"].high
    assert found["probe_process_among_correct"].value is None  # of the right answers all are right processes


def test_what_prompts_alone_give_away_is_in_the_baseline():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 8)
    correct = group % 2 == 0  # easy and hard prompts, and embeddings that say which
    vectors = rng.normal(size=(320, 8))
    vectors[:, 0] += np.where(correct, 3.0, -3.0)
    score = separation(vectors, correct, np.full(320, -1), group)["probe_correct"]
    assert score.value > 0.95
    assert score.baseline == pytest.approx(score.value)


def test_a_group_is_in_one_fold_only():
    # Every group has its own direction, by which its members could be told if some of them were in the training fold.
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(30), 10)
    label = rng.random(30)[group] < 0.5
    label = label ^ (rng.random(300) < 0.1)
    vectors = np.eye(30)[group] + 0.01 * rng.normal(size=(300, 30))
    assert probe_auc(vectors.astype(np.float32), label[None], group).value < 0.75


def test_the_probe_agrees_with_scikit_learns_auc_on_two_folds():
    vectors = np.array([[2.0], [1.5], [1.8], [2.2], [1.6], [-1.0], [-2.0], [-1.2], [-0.5], [-1.1], [1.7], [-0.9]])
    label = np.array([True] * 5 + [False] * 5 + [False, True])
    group = np.array([0, 1] * 6)
    # A line through one dimension keeps the order of the points, so each fold's AUC is that of the values themselves.
    folds = [group == fold for fold in (0, 1)]
    pairs = [label[fold].sum() * (~label[fold]).sum() for fold in folds]
    aucs = [roc_auc_score(label[fold], vectors[fold, 0]) for fold in folds]
    expected = np.average(aucs, weights=pairs)
    assert probe_auc(vectors.astype(np.float32), label[None], group).value == pytest.approx(expected)


@pytest.mark.parametrize("num", [0, 1, 3])
@pytest.mark.parametrize("right", [True, False])
def test_one_class_or_a_few_points_give_reasons_instead_of_numbers(num, right):
    scores = separation(np.eye(4)[:num], np.full(num, right), np.ones(num, int), np.zeros(num, int))
    assert list(scores) == list(FIGURES)
    assert all(score.value is None and score.why for score in scores.values())


def test_three_points_of_two_classes_give_what_can_be_given():
    scores = separation(np.eye(3), np.array([True, True, False]), np.array([1, 0, -1]), np.zeros(3, int))
    assert scores["positive_similarity"].value == pytest.approx(0)
    assert scores["probe_correct"].value is None


def test_the_course_has_every_figure_at_every_step_and_grows_with_separation(run):
    course = separation_course(open_rollouts(run))
    assert len(course) == 3 * len(FIGURES)
    margin = course[course["figure"] == "margin"]["value"].to_numpy()
    assert margin[0] < margin[1] < margin[2]
    assert separation_course_figure(course).layout.xaxis.title.text == "step"


def test_a_long_course_shows_some_of_its_steps_from_the_first_to_the_last_and_says_so(run, monkeypatch):
    monkeypatch.setattr(separation_module, "MAX_COURSE_STEPS", 2)
    course = separation_course(open_rollouts(run))
    assert course["step"].unique().tolist() == [1, 3]
    assert separation_course_figure(course).layout.xaxis.title.text == "step (2 of 3 shown)"


# -- comparison --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> list:
    """grpo and grpo+clipo with seeds 0, 1, 2; accuracies .5 .6 .7 and .6 .8 .7."""
    folder = tmp_path_factory.mktemp("comparison")
    for name, accuracies in (("grpo", (0.5, 0.6, 0.7)), ("clipo", (0.6, 0.8, 0.7))):
        for seed, accuracy in enumerate(accuracies):
            config = {"contrastive": None} if name == "grpo" else {}
            path = write_run(folder / f"{name}{seed}", seed=seed, steps=2, config=config)
            line = '{{"step": 2, "data": "sums", "accuracy": {0}, "process_consistent_among_correct": null}}\n'
            (path / "evaluations.jsonl").write_text(line.format(0.1) + line.format(accuracy))
    return open_arms(folder)


def test_no_two_of_many_arms_are_drawn_alike(arms):
    many = [replace(arms[0], name=f"arm {number}") for number in range(2 * len(SERIES) + 1)]
    lines = [(line.line.color, line.line.dash) for line in curves_figure(many, ["reward/mean"]).data if line.line.width]
    assert len(lines) == len(set(lines)) == len(many)


def test_runs_that_differ_in_their_seed_only_are_one_arm(arms):
    assert [(arm.name, list(arm.runs)) for arm in arms] == [("grpo", [0, 1, 2]), ("grpo+clipo", [0, 1, 2])]


def test_other_settings_make_another_arm_and_name_it(tmp_path):
    low = write_run(tmp_path / "low", steps=1)
    high = write_run(tmp_path / "high", steps=1, config={"contrastive": {"weight": 0.5, "floor": -0.5}})
    names = [arm.name for arm in open_arms([low, high])]
    assert names == [
        "grpo+clipo (contrastive.shuffle False, contrastive.weight 0.2)",
        "grpo+clipo (contrastive.shuffle None, contrastive.weight 0.5)",
    ]
    with pytest.raises(InputError, match="one run of each arm and seed"):
        open_arms([low, write_run(tmp_path / "again", steps=1)])


def test_arms_without_the_term_come_first_and_else_in_the_order_of_their_runs(tmp_path):
    configs = {"clipo": {}, "gspo": {"contrastive": None, "objective": {"name": "gspo"}}, "grpo": {"contrastive": None}}
    runs = [write_run(tmp_path / name, steps=1, config=config) for name, config in configs.items()]
    assert [arm.name for arm in open_arms(runs)] == ["gspo", "grpo", "grpo+clipo"]


def test_differences_are_paired_by_seed(arms):
    summary = evaluation_summary(arms, "grpo").set_index("arm")
    own = summary.loc["grpo+clipo"]
    # Differences .1, .2, 0: mean .1, standard deviation .1, t(2) = 4.3027.
    assert own["difference"] == pytest.approx(0.1)
    assert own["difference_half"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert own["pairs"] == 3
    assert np.isnan(summary.loc["grpo"]["difference"])
    with pytest.raises(InputError, match="`baseline` must be of grpo, grpo\\+clipo, got 'x'"):
        evaluation_summary(arms, "x")


def test_a_single_seed_has_no_interval():
    assert mean_with_interval([0.5])[0] == 0.5
    assert np.isnan(mean_with_interval([0.5])[1])
    assert np.isnan(mean_with_interval([])[0])


def test_curves_have_a_mean_a_step_and_arm(arms):
    table = curves(arms, "contrastive/loss")
    assert table.groupby("arm")["mean"].apply(list).to_dict() == {"grpo": [1.0, 0.5], "grpo+clipo": [1.0, 0.5]}
    assert (table["seeds"] == 3).all()


def test_problems_of_training_are_met_in_the_same_step(tmp_path):
    half = write_run(tmp_path / "half", config={"contrastive": None})
    whole = write_run(tmp_path / "whole", only_right=True)
    baseline, arm = open_arms([half, whole])
    found = compare_problems(arm, baseline)
    assert len(found.frame) == 2 * 4  # the last half of three steps, rounded up, four prompts each
    assert (found.frame["difference"] == 0.5).all()
    assert found.where.startswith("training problems")
    assert len(responses_to(arm.runs[0], found.frame.iloc[0])) == 6


def test_problems_of_the_last_common_evaluation_are_compared_where_every_run_has_recorded_it(tmp_path):
    arms = {}
    for name, config, right in (("grpo", {"contrastive": None}, 1), ("clipo", {}, 2)):
        arms[name] = write_run(tmp_path / name, config=config, steps=2)
        for step in (0, 2):
            write_responses(arms[name], step, "sums", [right if step else 0, 1])
    write_responses(arms["clipo"], 4, "sums", [0, 0])  # further than the other
    write_responses(arms["clipo"], 2, "longer", [0, 0])  # on its own
    baseline, arm = open_arms(tmp_path)
    found = compare_problems(arm, baseline)
    assert found.where == "problems of sums, last evaluation, paired by seed"
    assert found.frame["step"].tolist() == [2, 2]
    assert found.frame["prompt"].tolist() == ["sums problem 0", "sums problem 1"]
    assert found.frame["difference"].tolist() == [0.5, 0.0]
    assert responses_to(arm.runs[0], found.frame.iloc[0])["correct"].tolist() == [True, True]
