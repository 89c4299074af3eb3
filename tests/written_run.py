"""A small run folder with known contents, written as the trainer writes it: what the tests of the pictures look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from clipo_ds.records import RunWriter

FALSE_STEP = "2+2=5;5-1=4;#4"  # the answer is right, both ways lead there
RIGHT = "2+2=4;#4"
WRONG = "2+2=6;#6"
CONFIG = {
    "steps": 3,
    "seed": 0,
    "objective": {"name": "grpo", "advantage_normalize": None},
    "contrastive": {"weight": 0.2, "floor": -0.5, "shuffle": False},
    "model": {"path": "arithmetic"},
}


def write_run(
    path: Path,
    *,
    steps: int = 3,
    groups: int = 4,
    group_size: int = 6,
    size: int = 8,
    embeddings: bool = True,
    only_right: bool = False,
    config: dict | None = None,
    seed: int = 0,
) -> Path:
    """Groups of `group_size`: half right (the last of them with a false step), half wrong; the same prompts each step.

    Right answers lie around one direction, wrong ones around another, both the further apart the later the step.
    """
    rng = np.random.default_rng(seed)
    config = CONFIG | {"steps": steps, "seed": seed} | (config or {})
    writer = RunWriter.create(path, config_yaml=yaml.safe_dump(config), ds_config={}, environment={"commit": "abc"})
    num, half = groups * group_size, group_size // 2
    place = np.arange(num) % group_size
    correct = np.ones(num, bool) if only_right else place < half
    false_step = correct & (place == half - 1)
    for step in range(1, steps + 1):
        contrast = np.where(false_step, -0.5, np.where(correct, 0.1, 0.0))
        reward = correct + contrast
        vectors = rng.normal(size=(num, size))
        vectors[:, 0] += np.where(correct, 1, -1) * step
        columns = {
            "group": np.arange(num) // group_size,
            "prompt": [f"2+2: problem {n // group_size} <b>" for n in range(num)],
            "response": np.where(false_step, FALSE_STEP, np.where(correct, RIGHT, WRONG)).tolist(),
            "ground_truth": ["4"] * num,
            "extracted": ["4" if right else "6" for right in correct],
            "correct": correct,
            "process_consistent": (correct & ~false_step).tolist(),
            "reward": reward.astype(np.float32),
            "contrastive_loss": [1.0 if right else None for right in correct],
            "contrastive_reward": contrast.astype(np.float32),
            "advantage": (reward - reward.mean()).astype(np.float32),
            "num_tokens": np.full(num, 10, np.int32) + place.astype(np.int32),
            "truncated": np.zeros(num, bool),
            "source": ["sums"] * num,
            "prompt_uid": (100 + np.arange(num) // group_size).tolist(),
            "outcome_reward": correct.astype(np.float32),
        }
        if embeddings:
            columns["embedding"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        writer.write_rollouts(step, columns)
        writer.write_metrics(
            step,
            {
                "reward/mean": 0.5, "reward/total": 0.55, "accuracy/mean": float(correct.mean()),
                "process/consistent": 0.4, "process/consistent_among_correct": 0.5 + step / 10 / max(1, steps / 3),
                "contrastive/loss": 1.0 / step, "contrastive/valid_share": 1.0, "contrastive/floor_share": 0.1,
                "contrastive/positive_similarity": 0.6, "contrastive/negative_similarity": 0.1,
                "contrastive/reward_process_right": 0.1, "contrastive/reward_process_wrong": -0.5,
                "contrastive/reward_gap": 0.6, "contrastive/head_norm": 2.0, "time/step": 0.1,
                "response/length": 10.0 + seed,
            },
        )  # fmt: skip
    return path


def write_responses(path: Path, step: int, data: str, num_right: list[int]) -> None:
    """Two responses to each problem of a test set, the first of them right as often as `num_right` says."""
    correct = [sample < right for right in num_right for sample in range(2)]
    problems = [number for number in range(len(num_right)) for _ in range(2)]
    columns = {
        "uid": problems, "sample": [0, 1] * len(num_right), "prompt": [f"{data} problem {n}" for n in problems],
        "response": [RIGHT if right else WRONG for right in correct], "ground_truth": ["4"] * len(correct),
        "extracted": ["4" if right else "6" for right in correct], "correct": correct,
        "status": ["verified" if right else "wrong" for right in correct],
        "process_consistent": correct, "num_tokens": [10] * len(correct), "truncated": [False] * len(correct),
    }  # fmt: skip
    RunWriter(path).write_responses(step, data, columns)


def write_comparison(folder: Path, *, num_seeds: int = 3) -> Path:
    """A folder of runs as `scripts/compare.py` makes it: baseline and CLIPO, each with `num_seeds` seeds, evaluated."""
    for arm, config in (("grpo", {"contrastive": None}), ("clipo", {})):
        for seed in range(num_seeds):
            path = write_run(
                folder / f"{arm}-seed{seed}", only_right=arm == "clipo" and seed > 0, config=config, seed=seed
            )
            for step in (0, 3):
                gain = (0.06 + 0.01 * seed if arm == "clipo" else 0.03) * step + 0.02 * seed
                for data, start in (("sums", 0.4), ("longer_sums", 0.2)):
                    figures = {"accuracy": start + gain, "process_consistent_among_correct": start + 1.5 * gain}
                    bounds = {
                        f"{name}_{end}": value + shift
                        for name, value in figures.items()
                        for end, shift in (("low", -0.08), ("high", 0.08))
                    }
                    right = [min(2, seed + (step > 0)), 1 + (arm == "clipo"), 1]
                    write_responses(path, step, data, right)
                    RunWriter(path).write_evaluation(step, {"data": data, **figures, **bounds, "num_problems": 128})
    return folder


def tear_newest(path: Path) -> None:
    """Cut the newest rollouts file in half, as a folder that is being copied has it."""
    newest = max((path / "rollouts").glob("step_*.parquet"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
