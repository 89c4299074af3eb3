"""Means over ranks and warnings in words; the README's table of metrics is made from the program's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clipo_ds import distributed
from clipo_ds.metrics import METRICS, Means, warnings_in_words
from clipo_ds.schema import DataConfig, ModelConfig, RolloutConfig, TrainConfig

README = Path(__file__).parents[1] / "README.md"
OPENING, CLOSING = "<!-- metrics -->\n", "<!-- /metrics -->"


def readme_with_table() -> str:
    text = README.read_text(encoding="utf-8")
    rows = "".join(f"| `{name}` | {meaning.replace('|', '&#124;')} |\n" for name, meaning in METRICS.items())
    start, stop = text.index(OPENING) + len(OPENING), text.index(CLOSING)
    return f"{text[:start]}\n| key in metrics.jsonl | meaning |\n|---|---|\n{rows}\n{text[stop:]}"


def test_readme_lists_every_metric():
    if not README.exists():
        pytest.skip("there is no README.md beside the package")
    assert README.read_text(encoding="utf-8") == readme_with_table(), "run `python tests/test_metrics.py`"


def test_means_divide_sums_by_counts_and_are_nan_over_nothing():
    ranks = distributed.start()
    means = Means()
    values = torch.tensor([1.0, 2.0, 6.0])
    means.add("all", values)  # 9 / 3
    means.add("some", values, torch.tensor([True, False, True]))  # 7 / 2
    means.add("none", values, torch.zeros(3, dtype=torch.bool))
    means.add("shares", torch.tensor([True, False, False, False]))  # 1 / 4
    reduced = means.reduce(ranks)
    distributed.stop()
    assert reduced["all"] == 3
    assert reduced["some"] == 3.5
    assert math.isnan(reduced["none"])
    assert reduced["shares"] == 0.25


def test_warnings_name_the_setting():
    config = TrainConfig(
        model=ModelConfig(path="m"), data=DataConfig(train=["x"]), rollout=RolloutConfig(max_new_tokens=77)
    )
    quiet = {"response/truncated": 0.1, "groups/zero_variance": 0.5, "accuracy/mean": 0.5}
    assert warnings_in_words(config, quiet) == {}
    loud = {
        "response/truncated": 0.97,
        "groups/zero_variance": 0.9,
        "accuracy/mean": 0.02,
        "contrastive/floor_share": 0.6,
    }
    found = warnings_in_words(config, loud)
    assert "rollout.max_new_tokens = 77" in found["truncated"]
    assert "hard" in found["zero_variance"]
    assert "contrastive.reward_centering" in found["floor"]


if __name__ == "__main__":
    README.write_text(readme_with_table(), encoding="utf-8")
