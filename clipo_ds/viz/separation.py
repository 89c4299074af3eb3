"""How far apart right and wrong lie, in numbers, each beside what the same figure is for shuffled labels.

A picture in two dimensions can look separated without meaning it, and embeddings can tell right from wrong only because
some prompts are easier than others. So every figure is computed in the original space, and its baseline shuffles the
labels *within groups*: whatever the prompts alone give away stays in the baseline, and what exceeds it is told by the
rollouts. Probes are fitted and tested on different groups.

Functions of arrays: numpy, and for probes scipy and scikit-learn, imported when there is one to fit: the picture, which
comes before the numbers, need not wait for it. Rows that are not of unit length are normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from clipo_ds.viz.frames import Rollouts
from clipo_ds.viz.projections import one_thread, subsample

FIGURES = {
    "silhouette_global": "silhouette of right against wrong answers, all rollouts",
    "silhouette_group": "silhouette of right against wrong answers, within groups",
    "positive_similarity": "cosine similarity, right with right, within groups",
    "negative_similarity": "cosine similarity, right with wrong, within groups",
    "margin": "similarity right-right minus right-wrong, within groups",
    "probe_correct": "probe AUC: right answer",
    "probe_process": "probe AUC: right process",
    "probe_process_among_correct": "probe AUC: right process among right answers",
}
NUM_SHUFFLES = 20
MAX_ROLLOUTS = 2_000  # of one table of figures, and 512 of a point of a course: distances are quadratic
MAX_COURSE_ROLLOUTS = 512
MAX_COURSE_STEPS = 30  # of a course, from the first to the last: every one is probed anew
NUM_FOLDS = 5
MIN_PROBE_CLASS = 5


@dataclass(frozen=True)
class Score:
    """One figure."""

    value: float | None  # None where it is undefined, `why` says why
    baseline: float | None = None  # mean over the shuffles
    low: float | None = None  # 2.5% and 97.5% quantiles of the shuffles
    high: float | None = None
    why: str = ""


def separation(
    vectors: np.ndarray,
    correct: np.ndarray,
    process: np.ndarray,
    group: np.ndarray,
    *,
    num_shuffles: int = NUM_SHUFFLES,
    seed: int = 0,
) -> dict[str, Score]:
    """The FIGURES of some rollouts.

    Args:
        vectors: Float[N, D].
        correct: Bool[N].
        process: Int[N], 1 for a right process, 0 for a wrong one, -1 where unknown.
        group: Int[N], any labels; rollouts of one prompt share one.
        num_shuffles: Times that the labels are shuffled for the baselines.
        seed: Of the shuffles.

    Returns:
        A score for every key of FIGURES.
    """
    rng = np.random.default_rng(seed)
    unit = _unit(vectors)
    correct = np.asarray(correct, bool)
    group = np.unique(group, return_inverse=True)[1] if len(group) else np.zeros(0, np.int64)
    labels = _with_shuffles(correct, group, num_shuffles, rng)  # Bool[1 + S, N]
    scores = {}
    if correct.all() or not correct.any():
        why = f"there are only {'right' if len(correct) and correct.all() else 'wrong'} answers"
        scores = {name: Score(None, why="there are no rollouts" if len(correct) == 0 else why) for name in FIGURES}
    else:
        with one_thread():
            scores["silhouette_global"] = _score(silhouettes(1 - unit @ unit.T, labels).mean(1))
            scores |= _within_groups(unit, labels, group)
        scores["probe_correct"] = probe_auc(unit, labels, group)
    known = np.asarray(process) >= 0
    for name, chosen in (("probe_process", known), ("probe_process_among_correct", known & correct)):
        right = np.asarray(process)[chosen] == 1
        shuffled = _with_shuffles(right, group[chosen], num_shuffles, rng)
        scores[name] = probe_auc(unit[chosen], shuffled, group[chosen])
    return {name: scores[name] for name in FIGURES}


def silhouettes(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Silhouette of every point for two classes, for many labellings at once (Rousseeuw 1987).

        s_i = (b_i - a_i) / max(a_i, b_i),   a, b: mean distance to the others of the own class, and to the other class

    A point alone in its class has 0, as has everything where a class is empty.

    Args:
        distances: Float[N, N].
        labels: Bool[S, N].

    Returns:
        Float[S, N].
    """
    counts = np.stack([(~labels).sum(1), labels.sum(1)])  # (2, S)
    to_true = labels.astype(distances.dtype) @ distances  # (S, N): the sum to the True ones
    to_false = distances.sum(0) - to_true
    own = np.where(labels, to_true, to_false)
    other = np.where(labels, to_false, to_true)
    size = np.where(labels, counts[1][:, None], counts[0][:, None])
    rest = labels.shape[1] - size
    a, b = own / np.maximum(size - 1, 1), other / np.maximum(rest, 1)
    widest = np.maximum(a, b)
    defined = (size > 1) & (rest > 0) & (widest > 0)
    return np.where(defined, (b - a) / np.where(defined, widest, 1.0), 0.0)


def probe_auc(vectors: np.ndarray, labels: np.ndarray, group: np.ndarray) -> Score:
    """Area under the ROC curve of a linear probe on groups that it was not fitted on.

    Ridge regression on ±1, the AUC of each fold by its number of right-wrong pairs: scores of different folds are not
    compared with each other. Chance is 0.5.

    Args:
        vectors: Float[N, D].
        labels: Bool[1 + S, N], the true ones first, then shuffled ones.
        group: Int[N]; a group is in one fold only.
    """
    from scipy.stats import rankdata
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold

    truth = labels[0]
    if truth.all() or not truth.any():
        return Score(None, why="all rollouts in question are of one class")
    if min(truth.sum(), (~truth).sum()) < MIN_PROBE_CLASS:
        return Score(None, why=f"a probe needs {MIN_PROBE_CLASS} rollouts of each class at least")
    num_folds = min(NUM_FOLDS, len(np.unique(group)))
    if num_folds < 2:
        return Score(None, why="a probe needs rollouts of two prompts at least")
    wins, pairs = np.zeros(len(labels)), np.zeros(len(labels))
    with one_thread():
        for train, test in GroupKFold(num_folds).split(vectors, groups=group):
            signs = np.where(labels[:, train].T, 1.0, -1.0).astype(np.float32)
            centre = vectors[train].mean(0)
            scale = max(float(np.sqrt(((vectors[train] - centre) ** 2).sum(1).mean())), 1e-9)
            probe = Ridge(alpha=1.0).fit((vectors[train] - centre) / scale, signs)
            said = probe.predict((vectors[test] - centre) / scale).reshape(len(test), -1).T  # (1 + S, test)
            right = labels[:, test]
            num_right = right.sum(1)
            ranks = rankdata(said, axis=1)
            wins += (ranks * right).sum(1) - num_right * (num_right + 1) / 2
            pairs += num_right * (len(test) - num_right)
    if pairs[0] == 0:
        return Score(None, why="no two rollouts of different classes are in one fold")
    return _score(wins[pairs > 0] / pairs[pairs > 0])


def separation_of_step(table: Rollouts, step: int | None, *, max_rollouts: int = MAX_ROLLOUTS) -> dict[str, Score]:
    """The FIGURES of one step, or of all of them together, whole groups of them where they are too many.

    Raises:
        InputError: The run has no embeddings.
    """
    rows = np.arange(len(table.frame)) if step is None else table.rows_of(step)
    part = Rollouts(table.run, table.frame.iloc[rows].reset_index(drop=True))
    rows = rows[subsample(part, max_rollouts)]
    vectors = table.embeddings(rows)
    whole = np.isfinite(vectors).all(1)
    frame = table.frame.iloc[rows[whole]]
    process = frame["process_consistent"].astype("Int8").fillna(-1).to_numpy(np.int8)
    group = frame.groupby(["step", "group"], sort=False).ngroup().to_numpy()
    return separation(vectors[whole], frame["correct"].to_numpy(), process, group)


def separation_course(table: Rollouts, steps: list[int] | None = None) -> pd.DataFrame:
    """The FIGURES over training: columns `step`, `figure`, `value`, `baseline`, `low`, `high`, `why`.

    Args:
        table: The run's rollouts.
        steps: The steps wanted; None takes all, or MAX_COURSE_STEPS evenly spread ones where there are more.
            `attrs["num_steps"]` of the result says how many there are.

    Raises:
        InputError: The run has no embeddings.
    """
    if steps is None:
        places = np.linspace(0, len(table.steps) - 1, min(len(table.steps), MAX_COURSE_STEPS)).round().astype(int)
        steps = [table.steps[place] for place in places]
    rows = [
        {"step": step, "figure": name, **vars(score)}
        for step in steps
        for name, score in separation_of_step(table, step, max_rollouts=MAX_COURSE_ROLLOUTS).items()
    ]
    course = pd.DataFrame(rows).astype(dict.fromkeys(("value", "baseline", "low", "high"), np.float64))
    course.attrs["num_steps"] = len(table.steps)
    return course


def _within_groups(unit: np.ndarray, labels: np.ndarray, group: np.ndarray) -> dict[str, Score]:
    """Silhouette and similarities over pairs of one group, for every labelling."""
    silhouette, points = np.zeros(len(labels)), 0
    positive, negative, num_positive, num_negative = np.zeros((4, len(labels)))
    for members in _members(group):
        own = labels[:, members]
        similarity = (unit[members] @ unit[members].T).astype(np.float64)
        right = own.astype(np.float64)
        num_right = right.sum(1)
        together = np.einsum("si,ij,sj->s", right, similarity, right)
        self_similarity = right @ np.diag(similarity)
        positive += together - self_similarity
        num_positive += num_right * (num_right - 1)
        negative += right @ similarity.sum(1) - together
        num_negative += num_right * (len(members) - num_right)
        if 0 < num_right[0] < len(members):  # shuffled within the group, so in all labellings or in none
            silhouette += silhouettes(1 - similarity, own).sum(1)
            points += len(members)
    with np.errstate(invalid="ignore"):
        similar, apart = positive / num_positive, negative / num_negative
    mixed, alone = "no group has both right and wrong answers", "no group has two right answers"
    return {
        "silhouette_group": _score(silhouette / points) if points else Score(None, why=mixed),
        "positive_similarity": _score(similar) if num_positive[0] else Score(None, why=alone),
        "negative_similarity": _score(apart) if num_negative[0] else Score(None, why=mixed),
        "margin": _score(similar - apart) if num_positive[0] and num_negative[0] else Score(None, why=mixed),
    }


def _members(group: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(group, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _with_shuffles(label: np.ndarray, group: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Bool[1 + num, N]: the labels, then the labels shuffled within groups."""
    rows = np.tile(label, (1 + num, 1))
    for members in _members(group) if len(group) else []:
        rows[1:, members] = rng.permuted(rows[1:, members], axis=1)
    return rows


def _score(values: np.ndarray) -> Score:
    """The true labels' figure and what the shuffled ones give."""
    rest = values[1:]
    if len(rest) == 0:
        return Score(float(values[0]))
    low, high = np.quantile(rest, [0.025, 0.975])
    return Score(float(values[0]), float(rest.mean()), float(low), float(high))


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = np.asarray(vectors, np.float32)
    if wide.size == 0:
        return wide
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-9)
