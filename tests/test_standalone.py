"""What is done with a run from outside: evaluations beside its own, and models that bring their code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from clipo_ds.cli import evaluate_main, export_main
from clipo_ds.records import open_run

# What a test set from a file needs; the built-in task has its own prompts.
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
# A model type that transformers does not know; its code lies beside the weights.
CODE = """
from transformers import {base}Config, {base}ForCausalLM

class OwnConfig({base}Config):
    model_type = "clipo_ds_test"

class OwnForCausalLM({base}ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def run_folder(recorded_run: Path, tmp_path: Path) -> Path:
    """A copy of the recorded run that a test may write into."""
    return Path(shutil.copytree(recorded_run, tmp_path / "run"))


def test_an_evaluation_of_a_run_stands_beside_the_runs_own_with_its_settings(run_folder, capsys):
    run = open_run(run_folder)
    own = {file.name: file.read_bytes() for file in (run_folder / "evaluations").iterdir()}
    evaluated = run.evaluations()
    for _ in range(2):  # in one second perhaps: neither replaces the other
        assert evaluate_main(["--model", str(run_folder), "--max_problems=3", "--max_new_tokens=8"]) == 0
    assert {file.name: file.read_bytes() for file in (run_folder / "evaluations").iterdir()} == own
    assert run.evaluations() == evaluated
    rows = run.separate_evaluations()
    assert [row["data"] for row in rows] == ["arithmetic", "arithmetic_harder"] * 2
    assert len({row["file"] for row in rows}) == 4
    for row in rows:
        assert (row["step"], row["num_problems"]) == (6, 3)
        assert row["settings"].items() >= {"max_new_tokens": 8, "max_problems": 3, "samples": 1, "seed": 0}.items()
        answers = run.separate_responses(row["file"])
        assert sum(answers["correct"].to_pylist()) == round(row["accuracy"] * 3)
        assert max(answers["num_tokens"].to_pylist()) <= 8


def test_two_test_sets_of_one_stem_are_two_evaluations(run_folder, tmp_path):
    (run_folder / "checkpoints" / "step_000006" / "model" / "chat_template.jinja").write_text(TEMPLATE)
    for folder, problem, answer in (("a", "1+1", "2"), ("b", "2+2", "4")):
        (tmp_path / folder).mkdir()
        row = {"problem": problem, "answer": answer}
        (tmp_path / folder / "sums.jsonl").write_text(json.dumps(row) + "\n")
        assert evaluate_main(["--model", str(run_folder), "--data", str(tmp_path / folder / "sums.jsonl")]) == 0
    rows = open_run(run_folder).separate_evaluations()
    assert [row["source"] for row in rows] == [str(tmp_path / folder / "sums.jsonl") for folder in ("a", "b")]
    truths = [open_run(run_folder).separate_responses(row["file"])["ground_truth"].to_pylist() for row in rows]
    assert truths == [["2"], ["4"]]


def test_a_model_that_brings_its_code_is_evaluated_and_exported_where_the_run_trusted_it(run_folder, tmp_path, capsys):
    model = run_folder / "checkpoints" / "step_000006" / "model"
    (model / "chat_template.jinja").write_text(TEMPLATE)
    bring_code(model)
    evaluate = ["--max_problems=1", "--max_new_tokens=8"]
    assert evaluate_main(["--model", str(run_folder), *evaluate]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    settings = (run_folder / "config.yaml").read_text()
    assert "trust_remote_code: false" in settings
    (run_folder / "config.yaml").write_text(settings.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert evaluate_main(["--model", str(run_folder), *evaluate]) == 0
    assert export_main([str(run_folder), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    data = tmp_path / "sums.jsonl"
    data.write_text(json.dumps({"problem": "1+1", "answer": "2"}) + "\n")
    alone = ["--model", str(tmp_path / "out"), "--data", str(data), *evaluate]
    capsys.readouterr()
    assert evaluate_main(alone) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert evaluate_main([*alone, "--trust_remote_code"]) == 0


def test_an_evaluation_is_made_where_ds_accelerator_says(run_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU is seen, and DS_ACCELERATOR says cpu
    assert evaluate_main(["--model", str(run_folder), "--max_problems=1", "--max_new_tokens=8"]) == 0


def bring_code(model: Path) -> None:
    """Make a model folder one that only its own code can load."""
    config = json.loads((model / "config.json").read_text())
    (base,) = config["architectures"]
    (model / "own_code.py").write_text(CODE.format(base=base.removesuffix("ForCausalLM")))
    config |= {
        "model_type": "clipo_ds_test",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"},
    }
    (model / "config.json").write_text(json.dumps(config))
