"""Embeddings in two dimensions, fitted once over all chosen steps, so that a point stays put while the steps go by.

PCA is the default: linear, fitted in a second, and it says how much of the variance is seen. PaCMAP, UMAP and t-SNE
bend the space to keep neighbours together; distances between far clusters mean little in them, and so does a cluster's
size. They start from the first 50 principal components, as is usual, and are kept beside the run.

More rollouts than `max_points` are drawn down to whole groups, evenly over the steps and of the same prompts wherever
they come again; the note that goes into the title says how many. Libraries that are not there cost the method that
needs them, and nothing else. Imports numpy; the others, scikit-learn among them, where a method needs them: importing
that takes longer than the rest of an opening.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from clipo_ds.types import InputError
from clipo_ds.viz.frames import Rollouts

METHODS = ("PCA", "PaCMAP", "UMAP", "t-SNE")
CENTRES = ("none", "group")
MAX_POINTS = {"PCA": 20_000, "PaCMAP": 5_000, "UMAP": 5_000, "t-SNE": 5_000}
"""Rollouts that are fitted and shown: what one core lays out within a minute."""

KEPT_COMPONENTS = 50
NUM_NEIGHBOURS = 15
NARROW = 1024
"""Dimensions up to which PCA decomposes the whole covariance: exact, and no slower than importing scikit-learn."""
LAYOUT = 2  # raised when the same settings give other points, so that older files are not taken for them
SMALLEST = 4  # rollouts from which a non-linear method makes sense of neighbours


@dataclass(frozen=True)
class Projection:
    """Where rollouts lie in the picture."""

    method: str
    centre: str
    rows: np.ndarray  # Int[M], rows of the table, ascending
    points: np.ndarray  # Float32[M, 2]
    explained: tuple[float, float] | None  # share of variance on each axis, for PCA
    note: str  # what is shown, for the title


def project(
    table: Rollouts,
    method: str = "PCA",
    *,
    centre: str = "none",
    max_points: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Projection:
    """Lay the rollouts of a table out in two dimensions.

    Args:
        table: The steps to fit over are those it has.
        method: One of METHODS.
        centre: `group` subtracts the mean of a rollout's group first, which takes away what its prompt has in
            common and leaves how siblings differ.
        max_points: Rollouts to fit and show at most; None takes MAX_POINTS.
        seed: Of the drawing and of the methods that start at random.
        use_cache: Keep the points in the run's folder `viz/`, and take them from there.

    Raises:
        InputError: An argument is none of these, the run has no embeddings, or the method's library is not there.
    """
    if method not in METHODS:
        raise InputError(f"`method` must be of {', '.join(METHODS)}, got {method!r}")
    if centre not in CENTRES:
        raise InputError(f"`centre` must be of {', '.join(CENTRES)}, got {centre!r}")
    limit = MAX_POINTS[method] if max_points is None else max_points
    rows = subsample(table, limit, seed)
    vectors = table.embeddings(rows)
    with np.errstate(invalid="ignore"):  # infinities of both signs
        whole = np.isfinite(vectors.sum(1, dtype=np.float32))  # asked of every entry, it would take 10 MB to say so
    if not whole.all():  # a copy of all of them takes as long as laying them out
        rows, vectors = rows[whole], vectors[whole]
    if len(rows) == 0:
        raise InputError(f"`run` must have embeddings, got '{table.run.path}', where none is finite")
    groups = _group_index(table, rows)
    settings = {"method": method, "centre": centre, "seed": seed, "layout": LAYOUT}
    file = _cache_file(table.run.path, settings, vectors, groups)
    if use_cache and file.exists():
        with np.load(file) as kept:
            points, explained = kept["points"], tuple(kept["explained"].tolist())
    else:
        points, explained = _lay_out(_centred(vectors, groups, centre), method, seed)
        if use_cache:
            _keep(file, points, explained)
    note = f"{len(rows):,} of {len(table.frame):,} rollouts"
    if len(rows) < len(table.frame):
        note += " (whole groups, drawn evenly over the steps)"
    return Projection(method, centre, rows, points, explained or None, note)


def turned_like(projection: Projection, earlier: Projection) -> Projection:
    """The projection, mirrored where its axes point the other way than those of an earlier one with rows in common."""
    _, own, other = np.intersect1d(projection.rows, earlier.rows, assume_unique=True, return_indices=True)
    agreement = (projection.points[own] * earlier.points[other]).sum(0)
    return replace(projection, points=projection.points * np.where(agreement < 0, -1, 1).astype(np.float32))


def subsample(table: Rollouts, limit: int, seed: int = 0) -> np.ndarray:
    """Rows of about `limit` rollouts: whole groups, the same share of every step and at least one group of each.

    Every prompt has one random rank. A step gives its groups in the order of their prompts' ranks, so a prompt that is
    drawn in one step is drawn in most others too, and its course can be followed.
    """
    frame = table.frame
    if len(frame) <= limit:
        return np.arange(len(frame))
    prompts = frame["prompt"].unique()
    rank = dict(zip(prompts.tolist(), np.random.default_rng(seed).permutation(len(prompts)).tolist(), strict=True))
    groups = frame.groupby(["step", "group"], sort=True).agg(prompt=("prompt", "first"), size=("prompt", "size"))
    groups["rank"] = groups["prompt"].map(rank)
    groups = groups.reset_index().sort_values(["step", "rank"], kind="stable")
    share = limit / len(frame)
    in_step = groups.groupby("step")["size"]
    before = in_step.cumsum() - groups["size"]
    kept = groups[(before + groups["size"] <= share * in_step.transform("sum")) | (before == 0)]
    chosen = frame.set_index(["step", "group"]).index.isin(kept.set_index(["step", "group"]).index)
    return np.flatnonzero(chosen)


def _group_index(table: Rollouts, rows: np.ndarray) -> np.ndarray:
    """Int[M]: a number for every group of every step."""
    return table.frame.iloc[rows].groupby(["step", "group"], sort=False).ngroup().to_numpy()


def _centred(vectors: np.ndarray, groups: np.ndarray, centre: str) -> np.ndarray:
    """Float32[M, D]."""
    wide = vectors.astype(np.float32)
    if centre == "group":
        sums = np.zeros((groups.max() + 1, wide.shape[1]), np.float32)
        np.add.at(sums, groups, wide)
        wide -= (sums / np.bincount(groups)[:, None])[groups]
    return wide


def _lay_out(vectors: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """Points Float32[M, 2] and, for PCA, the shares of variance; `vectors` are centred in place."""
    num, size = vectors.shape
    if (vectors.min(0) == vectors.max(0)).all():
        return np.zeros((num, 2), np.float32), ()  # all the same: nothing tells one direction from another
    reduced, explained = _principal(vectors, min(num, size, 2 if method == "PCA" else KEPT_COMPONENTS), seed)
    if method == "PCA" or num < SMALLEST or reduced.shape[1] < 2:
        points = np.zeros((num, 2), np.float32)
        points[:, : min(2, reduced.shape[1])] = reduced[:, :2]
        shares = tuple(float(share) for share in explained[:2])
        return points, (*shares, *[0.0] * (2 - len(shares))) if method == "PCA" else ()
    # Equal texts have equal embeddings: one of each is laid out, or the neighbours of a point would be its copies.
    _, first, which = np.unique(vectors, axis=0, return_index=True, return_inverse=True)
    distinct = reduced[first]
    if len(distinct) < SMALLEST:
        return np.ascontiguousarray(reduced[:, :2]), ()
    points = NONLINEAR[method](distinct, min(NUM_NEIGHBOURS, len(distinct) - 1), seed)
    return np.ascontiguousarray(points[which.reshape(-1)], np.float32), ()


def _principal(vectors: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components of Float32[M, D], Float32[M, count], and their shares of the variance.

    `vectors` are centred in place: getting 40 MB more takes longer than filling them.
    """
    vectors -= vectors.mean(0)
    if vectors.shape[1] > NARROW:
        from sklearn.decomposition import PCA

        pca = PCA(count, random_state=seed)
        with one_thread():
            return pca.fit_transform(vectors).astype(np.float32), pca.explained_variance_ratio_
    with one_thread():
        scatter = vectors.T @ vectors
        variances, axes = np.linalg.eigh(scatter)  # ascending
        variances, axes = variances[::-1][:count].clip(min=0.0), axes[:, ::-1][:, :count]
        # An axis may point either way: as in scikit-learn, its largest entry is positive.
        axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(count)])
        return vectors @ axes, variances / np.trace(scatter)


def one_thread() -> threadpool_limits:
    """While it is entered, linear algebra takes one thread, in every library that is loaded by then.

    Two are hardly faster for matrices of these sizes. Where something else wants the cores, the browser that draws or
    the run that trains, OpenBLAS's threads wait for each other wide awake, and 20,000 rollouts take 4 s to lay out
    instead of 0.2.
    """
    return threadpool_limits(1, "blas")


def _pacmap(vectors: np.ndarray, num_neighbours: int, seed: int) -> np.ndarray:
    pacmap = _library("pacmap", "PaCMAP")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on its own defaults
        return pacmap.PaCMAP(n_neighbors=num_neighbours, random_state=seed, apply_pca=False).fit_transform(vectors)


def _umap(vectors: np.ndarray, num_neighbours: int, seed: int) -> np.ndarray:
    umap = _library("umap", "UMAP", package="umap-learn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a seed costs parallelism, it says
        return umap.UMAP(n_neighbors=max(2, num_neighbours), random_state=seed).fit_transform(vectors)


def _tsne(vectors: np.ndarray, num_neighbours: int, seed: int) -> np.ndarray:
    perplexity = max(1.0, min(30.0, (len(vectors) - 1) / 3))
    return np.asarray(_library("openTSNE", "t-SNE").TSNE(perplexity=perplexity, random_state=seed).fit(vectors))


NONLINEAR: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {"PaCMAP": _pacmap, "UMAP": _umap, "t-SNE": _tsne}


def _library(module: str, method: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"`method` must be one whose library is installed, got {method!r}, which needs "
            f"`pip install {package or module}` (or clipo_ds[notebooks]); PCA needs nothing more"
        ) from error


# -- beside the run ----------------------------------------------------------------------------------------------------


def _cache_file(run: Path, settings: dict[str, Any], vectors: np.ndarray, groups: np.ndarray) -> Path:
    """Named by everything that the points depend on, the embeddings themselves included."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    digest.update(repr(vectors.shape).encode())
    digest.update(np.ascontiguousarray(vectors))
    digest.update(np.ascontiguousarray(groups))
    return run / "viz" / f"{settings['method'].lower()}-{digest.hexdigest()}.npz"


def _keep(file: Path, points: np.ndarray, explained: tuple[float, ...]) -> None:
    if not os.access(file.parent.parent, os.W_OK):
        return  # somebody else's run: it is laid out anew each time
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    np.savez_compressed(partial, points=points, explained=np.array(explained, np.float64))
    os.replace(partial, file)
