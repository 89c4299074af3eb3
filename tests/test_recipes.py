"""The shipped recipes: each loads for every objective, with and without the contrastive term."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipo_ds.config import RECIPES, dump_config, load_config, shipped_recipes
from clipo_ds.vllm_checks import choose_engine

OBJECTIVES = ("grpo", "dr_grpo", "dapo", "gspo", "gmpo")
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_easy_sums.py"


def read_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECIPES / name).read_text(encoding="utf-8").splitlines()]


def test_the_promised_recipes_are_shipped() -> None:
    assert {"demo", "smollm2_cpu", "gsm8k_qwen2.5_3b", "math_qwen2.5_7b", "gsm8k_qwen2.5_1.5b_lora"} <= set(
        shipped_recipes()
    )


@pytest.mark.parametrize("contrastive", ["on", "null"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("recipe", shipped_recipes())
def test_every_recipe_loads_for_every_objective(recipe: str, objective: str, contrastive: str, tmp_path: Path) -> None:
    flags = ["--objective.name", objective, *(["--contrastive", "null"] if contrastive == "null" else [])]
    config = load_config(recipe, flags)
    assert config.objective.name == objective
    assert (config.contrastive is None) == (contrastive == "null")
    assert config.recipe == recipe
    # The objective's published clip range must apply, so a recipe leaves these to the objective.
    assert config.objective.clip_low is config.objective.clip_high is config.objective.aggregation is None
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_recipes_say_where_they_come_from(recipe: str) -> None:
    assert (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8").startswith("#")


def test_the_published_recipe_of_track_1() -> None:
    config = load_config("gsm8k_qwen2.5_3b")
    assert config.model.path == "Qwen/Qwen2.5-3B-Instruct"
    assert config.model.lora is None
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (512, 16)
    assert config.rollout.prompts_per_step // config.optimizer.mini_batches == 256
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (512, 2048)
    assert (config.optimizer.learning_rate, config.objective.kl_coefficient) == (1e-6, 0.001)
    assert config.objective.kl_kind == "k3"
    assert config.contrastive is not None
    assert (config.contrastive.head_output_size, config.contrastive.head_warmup_steps) == (512, 13)
    assert config.steps == 6 * (7473 // 512)
    assert config.evaluation.samples == 1
    assert len(config.data.test) == 8


def test_the_published_recipe_of_track_2() -> None:
    config = load_config("math_qwen2.5_7b")
    assert config.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (128, 16)
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (512, 4096)
    assert (config.optimizer.learning_rate, config.objective.kl_coefficient) == (1e-6, 0.001)
    assert config.contrastive is not None
    assert (config.contrastive.head_output_size, config.contrastive.head_warmup_steps) == (2048, 57)
    assert config.steps == 10 * (7500 // 128)
    evaluation = config.evaluation
    assert (evaluation.samples, evaluation.temperature, evaluation.top_p) == (16, 0.6, 0.95)


@pytest.mark.parametrize("recipe", ["gsm8k_qwen2.5_3b", "math_qwen2.5_7b"])
def test_published_recipes_use_the_published_contrastive_term(recipe: str) -> None:
    term = load_config(recipe).contrastive
    assert term is not None
    assert (term.loss, term.level, term.similarity, term.denominator) == ("infonce", "group", "cosine", "all")
    assert (term.temperature, term.weight, term.floor, term.bonus) == (0.05, 0.2, -0.5, 0.0)
    assert (term.head, term.head_learning_rate, term.head_weight_decay) == ("linear", 1e-3, 0.01)
    assert (term.debias, term.reward_centering) == ("none", "none")


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_recipes_for_gpus_sample_with_vllm_where_it_is(recipe: str) -> None:
    for_cpus = recipe in ("demo", "smollm2_cpu")
    assert load_config(recipe).rollout.engine == ("transformers" if for_cpus else "auto")
    assert load_config(recipe).rollout.sleep is None  # with vLLM: asleep while the policy trains


def test_auto_is_vllm_on_gpus_where_it_is_installed_and_says_what_it_is(ranks, monkeypatch, caplog) -> None:
    config = load_config("gsm8k_qwen2.5_1.5b_lora")
    on_gpu, find = replace(ranks, device=torch.device("cuda")), importlib.util.find_spec
    for installed, where, engine, words in (
        (True, on_gpu, "vllm", "auto: sampling with vLLM"),
        (False, on_gpu, "transformers", "auto: sampling with transformers, since vLLM is not installed"),
        (True, ranks, "transformers", "auto: sampling with transformers, since there is no GPU"),
    ):
        found = find("json") if installed else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest, found=found: found if name == "vllm" else find(name, *rest)
        )
        caplog.clear()
        with caplog.at_level("INFO", logger="clipo_ds"):
            chosen = choose_engine(config, where)
        (line,) = caplog.messages
        assert chosen.rollout.engine == engine and words in line
        assert replace(chosen, rollout=replace(chosen.rollout, engine="auto")) == config
        assert chosen.sampler_sleeps == (engine == "vllm")
        assert choose_engine(chosen, on_gpu) is chosen  # what was resolved stays, also without vLLM


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_data_shipped_with_a_recipe_is_there(recipe: str) -> None:
    data = load_config(recipe).data
    for source in (*data.train, *data.test):
        if source.startswith("recipes:"):
            assert (RECIPES / source.removeprefix("recipes:")).is_file()


def test_the_easy_sums_are_what_their_script_writes() -> None:
    rows = runpy.run_path(str(SCRIPT))["make_rows"](num_train=200, num_test=40, seed=0)
    assert rows["train"] == read_rows("easy_sums.jsonl")
    assert rows["test"] == read_rows("easy_sums_test.jsonl")


def test_no_easy_sum_is_in_both_files() -> None:
    train, test = (
        {row["prompt"][-1]["content"] for row in read_rows(name)}
        for name in ("easy_sums.jsonl", "easy_sums_test.jsonl")
    )
    assert (len(train), len(test)) == (200, 40)
    assert not train & test


@pytest.mark.parametrize("name", ["easy_sums.jsonl", "easy_sums_test.jsonl"])
def test_easy_sums_have_true_answers(name: str) -> None:
    for row in read_rows(name):
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        text = row["prompt"][-1]["content"]
        a, b = (int(number) for number in re.findall(r"\d+", text))
        if "each" in text:
            expected = a * b
        elif "away" in text or "takes out" in text:
            expected = a - b
        else:
            expected = a + b
        assert row["reward_model"]["ground_truth"] == str(expected)
        assert expected > 0
