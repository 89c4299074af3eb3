"""The small model of the built-in task: its tokenizer, its cache, and that it learns."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clipo_ds.arithmetic import CHARACTERS
from clipo_ds.schema import FlawRates, TaskConfig
from clipo_ds.warm_start import _collate, build_model, build_tokenizer, cache_path, warm_start

TINY = TaskConfig(
    min_terms=2,
    max_terms=2,
    max_number=3,
    harder_max_terms=3,
    harder_max_number=3,
    warm_start_steps=4,
    warm_start_batch_size=8,
    hidden_size=32,
    num_layers=1,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPO_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_tokenizer_has_one_token_a_character_and_gives_every_text_back() -> None:
    tokenizer = build_tokenizer()
    text = "7+5-3+8:7+5=12;12-3=9;9+8=17;#17"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(CHARACTERS) + 2
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (0, 1, "left")
    assert tokenizer(text + tokenizer.eos_token)["input_ids"] == [*ids, 1]
    assert tokenizer.decode([0, *ids, 1], skip_special_tokens=True) == text


def test_only_response_tokens_are_learnt() -> None:
    input_ids, labels = _collate([("1+1:", "1+1=2;#2"), ("2-1:", "#1")], build_tokenizer())
    # 4 prompt characters, then 8 of the response and the end; the second row: 2 and the end, then 6 of padding
    assert input_ids.shape == labels.shape == (2, 13)
    assert (labels != -100).tolist() == [[False] * 4 + [True] * 9, [False] * 4 + [True] * 3 + [False] * 6]
    assert torch.equal(labels[labels != -100], input_ids[labels != -100])
    assert (input_ids[1, 7:] == 0).all()


def test_the_default_model_has_about_half_a_million_parameters() -> None:
    model = build_model(TaskConfig())
    assert 400_000 < sum(parameter.numel() for parameter in model.parameters()) < 600_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_making_the_model_leaves_the_global_generator_alone(cache: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    warm_start(TINY)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_the_folder_loads_with_plain_transformers_and_is_made_once(cache: Path) -> None:
    folder = warm_start(TINY)
    assert folder.parent == cache
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert tokenizer("1+1:")["input_ids"] == build_tokenizer()("1+1:")["input_ids"]
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert warm_start(TINY) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]  # nothing half-made is left


def test_the_same_task_makes_the_same_weights_with_any_number_of_threads(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (warm_start(TINY) / "model.safetensors").read_bytes()
    monkeypatch.setenv("CLIPO_DS_CACHE", str(cache / "other"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert (warm_start(TINY) / "model.safetensors").read_bytes() == first
    finally:
        torch.set_num_threads(threads)


def test_the_cache_is_keyed_by_all_that_the_weights_depend_on(cache: Path) -> None:
    same = [TINY, replace(TINY, num_test_prompts=3), replace(TINY, num_train_prompts=3)]
    others = [
        replace(TINY, **change)
        for change in (
            {"seed": 1},
            {"max_number": 4},
            {"answer_modulus": 2},
            {"flaws": FlawRates(slip=0.1)},
            {"warm_start_steps": 5},
            {"hidden_size": 64},
            {"warm_start_harder_share": 0.5},
        )
    ]
    assert len({cache_path(task) for task in same}) == 1
    assert len({cache_path(task) for task in [TINY, *others]}) == 1 + len(others)


def _make(start: multiprocessing.synchronize.Barrier, folder: str, results: multiprocessing.Queue) -> None:
    import os

    os.environ["CLIPO_DS_CACHE"] = folder
    start.wait()
    path = warm_start(TINY)
    results.put((str(path), AutoModelForCausalLM.from_pretrained(path).num_parameters()))


def test_two_processes_may_ask_at_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_make, args=(start, str(cache), results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert found[0] == found[1]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_failed_attempt_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(task: TaskConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clipo_ds.warm_start.train_supervised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm_start(TINY)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_the_supervised_stage_learns_to_work_sums_out(cache: Path) -> None:
    from clipo_ds.arithmetic import make_problems, verify_solution

    # 2 terms up to 3: the 15 problems that exist are soon learnt, those that the warm start never saw included or not.
    task = replace(
        TINY, warm_start_steps=150, warm_start_batch_size=32, warm_start_harder_share=0.0, num_test_prompts=1
    )
    folder = warm_start(task)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    problems = sorted({prompt[:-1] for prompt, _ in _examples(task, 200)})
    batch = tokenizer([problem + ":" for problem in problems], return_tensors="pt", padding=True)
    output = model.generate(**batch, max_new_tokens=12, do_sample=False)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [verify_solution(problem, text).process_correct for problem, text in zip(problems, texts, strict=True)]
    assert sum(right) >= 0.8 * len(right), list(zip(problems, texts, strict=True))
    assert make_problems(replace(task, num_train_prompts=1)).test[0] not in problems


def _examples(task: TaskConfig, count: int) -> list[tuple[str, str]]:
    from itertools import islice

    from clipo_ds.arithmetic import warm_start_examples

    return list(islice(warm_start_examples(task), count))
