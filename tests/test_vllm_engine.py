"""vLLM inside this process, for real, against full forward passes, the exact distribution and the trainer."""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from launching import SMALL, metrics, run, train
from scipy import stats
from small_policy import make_batch, make_policy
from stops import assert_stops_at
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from clipo_ds.distributed import Ranks
from clipo_ds.generation import AdapterEngine
from clipo_ds.records import open_run
from clipo_ds.schema import LoraConfig
from clipo_ds.types import Group, Prompt
from clipo_ds.vllm_engine import VllmAdapterEngine, VllmEngine
from clipo_ds.vllm_loading import Reload, reload_weights
from clipo_ds.warm_start import build_tokenizer
from clipo_ds.weight_sync import sync_weights

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.vllm

TOKENIZER = build_tokenizer()
VOCABULARY = len(TOKENIZER)
ENGINE = {
    "stop_ids": [1], "dtype": "float32", "max_model_len": 128, "max_sequences": 64, "kv_cache_bytes": 16 * 1024**2
}  # fmt: skip


def make_model(seed: int = 0, *, hidden_size: int = 64, intermediate_size: int = 96) -> LlamaForCausalLM:
    """Two layers with grouped-query attention, a tied head, and heads of a size that vLLM has on a CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # far from uniform, so that a wrong weight shows
        torch.nn.init.normal_(parameter, std=2.4 / hidden_size**0.5)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def only_engine(folder: str, ranks: Ranks) -> Iterator[VllmEngine]:
    engine = VllmEngine(folder, TOKENIZER, **ENGINE)
    yield engine
    engine.close()


@pytest.fixture
def engine(only_engine: VllmEngine) -> Iterator[VllmEngine]:
    """The one engine of this file, with the weights of `make_model()`."""
    stop_ids, stop_texts = only_engine.stop_ids, only_engine.stop_texts
    only_engine.load_weights(weights(make_model()).items())
    yield only_engine
    only_engine.stop_ids, only_engine.stop_texts = stop_ids, stop_texts


def make_prompts(*lengths: int) -> list[Prompt]:
    stream = np.random.default_rng(0)
    ids = [tuple(int(t) for t in stream.integers(2, VOCABULARY, length)) for length in lengths]
    return [Prompt(uid, TOKENIZER.decode(i), i, "0", "test") for uid, i in enumerate(ids)]


def tokens(groups: list[Group]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(g.prompt.uid, k): r.token_ids for g in groups for k, r in enumerate(g.rollouts)}


@torch.no_grad()
def largest_gap(model: torch.nn.Module, groups: list[Group]) -> float:
    """Largest difference of the reported log-probabilities from those of full forwards without a cache."""
    gaps = []
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.tensor([[*group.prompt.token_ids, *rollout.token_ids]])
            rows = model(ids).logits[0, len(group.prompt.token_ids) - 1 : -1].double().log_softmax(-1)
            exact = rows.gather(-1, torch.tensor(rollout.token_ids)[:, None]).squeeze(-1)
            gaps.append(float((exact - torch.tensor(rollout.logprobs, dtype=torch.float64)).abs().max()))
    return max(gaps)


def test_logprobs_equal_a_full_forward_of_each_rollout(engine: VllmEngine) -> None:
    groups = engine.generate(make_prompts(3, 11, 7), 4, max_new_tokens=40, seed=5)
    assert [len(group.rollouts) for group in groups] == [4, 4, 4]
    assert largest_gap(make_model(), groups) < 1e-5
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.text == TOKENIZER.decode(rollout.token_ids, skip_special_tokens=True)


def test_greedy_equals_transformers_generate(engine: VllmEngine) -> None:
    for group in engine.generate(make_prompts(2, 9, 5), 1, max_new_tokens=20, temperature=0.0, seed=0):
        ids = torch.tensor([group.prompt.token_ids])
        expected = make_model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert group.rollouts[0].token_ids == tuple(expected[0, ids.shape[1] :].tolist())


def test_a_rollout_depends_on_seed_uid_and_number_only(engine: VllmEngine) -> None:
    prompts = make_prompts(3, 14, 6, 1)
    together = tokens(engine.generate(prompts, 4, max_new_tokens=30, seed=1))
    backwards = tokens(engine.generate(prompts[::-1], 4, max_new_tokens=30, seed=1))
    alone = {
        key: ids for p in prompts for key, ids in tokens(engine.generate([p], 2, max_new_tokens=30, seed=1)).items()
    }
    assert together == backwards
    assert all(together[key] == ids for key, ids in alone.items())
    assert len(set(together.values())) == 16
    assert together[0, 0] != tokens(engine.generate(prompts[:1], 1, max_new_tokens=30, seed=2))[0, 0]


def test_sampling_leaves_the_global_generator_alone(engine: VllmEngine) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    engine.generate(make_prompts(3), 4, max_new_tokens=4, seed=0)
    assert torch.equal(torch.rand(4), expected)


def test_first_tokens_follow_the_softmax(engine: VllmEngine) -> None:
    prompt = make_prompts(6)[0]
    group = engine.generate([prompt], 2000, max_new_tokens=1, seed=11)[0]
    drawn = np.bincount([r.token_ids[0] for r in group.rollouts], minlength=VOCABULARY)
    with torch.no_grad():
        expected = make_model()(torch.tensor([prompt.token_ids])).logits[0, -1].double().softmax(-1).numpy() * 2000
    assert (expected >= 5).all()  # the usual condition of the test
    assert stats.chisquare(drawn, expected).pvalue > 0.001


def test_filters_and_temperature_leave_the_logprobs_those_of_the_full_distribution(engine: VllmEngine) -> None:
    groups = engine.generate(make_prompts(6, 3), 20, max_new_tokens=8, temperature=2.0, top_k=3, top_p=0.9, seed=0)
    assert largest_gap(make_model(), groups) < 1e-5


def test_a_response_ends_with_its_stop_token_or_is_truncated(engine: VllmEngine) -> None:
    engine.stop_ids = frozenset({3, 6})
    groups = engine.generate(make_prompts(3, 5), 16, max_new_tokens=8, seed=0)
    rollouts = [r for g in groups for r in g.rollouts]
    for rollout in rollouts:
        assert not engine.stop_ids & set(rollout.token_ids[:-1])
        assert rollout.truncated == (rollout.token_ids[-1] not in engine.stop_ids)
        assert len(rollout.token_ids) == 8 or not rollout.truncated
        assert len(rollout.logprobs) == len(rollout.token_ids)
    assert {r.truncated for r in rollouts} == {True, False}


def test_a_stop_token_at_the_cap_is_not_a_truncation(engine: VllmEngine) -> None:
    engine.stop_ids = frozenset()
    first = engine.generate(make_prompts(3), 1, max_new_tokens=1, seed=0)[0].rollouts[0]
    assert first.truncated and len(first.token_ids) == 1
    engine.stop_ids = frozenset(first.token_ids)
    again = engine.generate(make_prompts(3), 1, max_new_tokens=1, seed=0)[0].rollouts[0]
    assert again.token_ids == first.token_ids and not again.truncated


def test_a_stop_text_ends_a_response_where_it_is_complete(engine: VllmEngine) -> None:
    free = engine.generate(make_prompts(3, 5), 16, max_new_tokens=30, seed=0)
    engine.stop_texts = ("=", "+1")
    stopped = engine.generate(make_prompts(3, 5), 16, max_new_tokens=30, seed=0)
    earliest = min(("=", "+1"), key=lambda stop: sum(stop in r.text for g in free for r in g.rollouts))
    engine.stop_texts = (earliest,)
    assert all("=" not in r.text and "+1" not in r.text for g in stopped for r in g.rollouts)
    stopped = engine.generate(make_prompts(3, 5), 16, max_new_tokens=30, seed=0)
    assert_stops_at(earliest, stopped, free, TOKENIZER, 1e-5)


def test_no_prompts_give_no_groups_and_a_long_one_is_refused(engine: VllmEngine) -> None:
    assert engine.generate([], 4, max_new_tokens=4, seed=0) == []
    with pytest.raises(ValueError, match=r"`rollout.vllm.max_model_len` must be at least 130"):
        engine.generate(make_prompts(30), 1, max_new_tokens=100, seed=0)


def test_twenty_syncs_in_a_row_let_neither_memory_nor_mismatch_grow(ranks: Ranks, tmp_path: Path) -> None:
    prompts, process = make_prompts(3, 20), psutil.Process()
    # Large enough that a copy of its weights shows in the size of a process.
    model, gaps, sizes = make_model(seed=1, hidden_size=512, intermediate_size=1024), [], []
    model.save_pretrained(tmp_path)
    engine = VllmEngine(str(tmp_path), TOKENIZER, **ENGINE)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        engine.load_weights(weights(model).items())
        gaps.append(largest_gap(model, engine.generate(prompts, 4, max_new_tokens=20, seed=0)))
        gc.collect()
        sizes.append(process.memory_info().rss)
    logger.info("largest gap after each sync: %s", " ".join(f"{gap:.1e}" for gap in gaps))
    logger.info("resident MB after each: %s", " ".join(f"{size / 1e6:.0f}" for size in sizes))
    assert max(gaps) < 2e-5
    assert sizes[-1] - sizes[4] < 4 * num_bytes  # of 15 syncs; allocators take some before to settle


def test_a_tied_head_that_is_left_out_fails_by_name(engine: VllmEngine) -> None:
    rest = {n: w for n, w in weights(make_model()).items() if n != "lm_head.weight"}
    with pytest.raises(RuntimeError, match=r"weight sync failed: lm_head\.weight was left out"):
        engine.load_weights(rest.items())


def test_a_tied_head_alone_counts_as_itself_and_not_as_the_whole_model(engine: VllmEngine) -> None:
    (left_out,) = engine._llm.collective_rpc(
        reload_weights, args=([("lm_head.weight", weights(make_model())["lm_head.weight"])],)
    )
    assert len(left_out) == 14 and "model.embed_tokens.weight" in left_out


def test_weights_are_counted_by_layers_where_a_model_does_not_say_what_it_took(engine: VllmEngine) -> None:
    def load_in_silence(worker: Any, pieces: list[dict[str, torch.Tensor]]) -> list[int]:
        model = worker.model_runner.get_model()
        update, load, counts = Reload(model, worker.model_runner.model_config), model.load_weights, []
        model.load_weights = lambda weights: load(weights) and None
        for piece in pieces:
            update.load(piece.items())
            counts.append(len(update.left_out()))
        model.load_weights = load
        update.finish()
        return counts

    whole = weights(make_model())
    head, rest = {"lm_head.weight": whole.pop("lm_head.weight")}, whole
    (counts,) = engine._llm.collective_rpc(load_in_silence, args=([head, rest],))
    assert counts == [14, 0]


def test_a_wrong_name_or_shape_fails_after_taking_all_weights(engine: VllmEngine) -> None:
    whole = weights(make_model())
    for wrong, message in (
        ({"model.norm.wait": torch.zeros(1)}, "model.norm.wait is not a parameter"),
        ({"model.norm.weight": torch.zeros(31)}, "model.norm.weight must have shape (64,), got (31,)"),
    ):
        stream = iter({**whole, **wrong}.items())
        with pytest.raises(RuntimeError, match=re.escape(message)):
            engine.load_weights(stream)
        assert next(stream, None) is None  # ranks gather weights together: nobody may stop early


def test_broken_weights_are_reported_not_sampled_from(engine: VllmEngine) -> None:
    engine.load_weights({**weights(make_model()), "model.norm.weight": torch.full((64,), math.nan)}.items())
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate(make_prompts(3), 1, max_new_tokens=2, seed=0)


def test_prompts_of_more_tokens_than_a_batch_holds_are_sampled(engine: VllmEngine) -> None:
    engine.load_weights(weights(make_model()).items())
    groups = engine.generate(make_prompts(*[100] * 100), 1, max_new_tokens=2, seed=0)
    assert [len(group.rollouts) for group in groups] == [1] * 100


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)])
def test_a_policy_partitioned_by_zero3_reaches_the_sampler_after_an_update(
    engine: VllmEngine, folder: str, ranks: Ranks, tmp_path: Path, lora: LoraConfig | None
) -> None:
    policy = make_policy(folder, ranks, stage=3, lora=lora)
    _update(policy)
    sync_weights(policy.model, engine)
    groups = engine.generate(make_prompts(3, 9), 4, max_new_tokens=12, seed=0)
    assert _policy_gap(policy, groups) < 1e-5
    assert largest_gap(make_model(), groups) > 0.01  # the update is to be seen


def test_an_adapter_sent_beside_the_base_weights_equals_the_policy(folder: str, ranks: Ranks) -> None:
    policy = make_policy(folder, ranks, stage=3, lora=LoraConfig(rank=4, alpha=8))
    engine = VllmAdapterEngine(folder, TOKENIZER, **ENGINE, lora_rank=4)
    assert isinstance(engine, AdapterEngine)
    for _ in range(3):  # each sync takes the place of the last
        _update(policy)
        sync_weights(policy.model, engine)
        groups = engine.generate(make_prompts(3, 9), 4, max_new_tokens=12, seed=0)
        assert _policy_gap(policy, groups) < 1e-5
    assert largest_gap(make_model(), groups) > 0.01
    many = engine.generate(make_prompts(*[100] * 6), 2, max_new_tokens=2, seed=0)  # more than one of its small batches
    assert _policy_gap(policy, many) < 1e-5


def _update(policy) -> None:
    """One optimiser step towards likelier responses, whatever they are."""
    batch = make_batch()
    batch = dataclasses.replace(
        batch, input_ids=batch.input_ids % VOCABULARY, response_ids=batch.response_ids % VOCABULARY
    )
    policy.backward(-policy.forward(batch).logprobs.sum(), last=True)
    policy.step()


def _policy_gap(policy, groups: list[Group]) -> float:
    """Largest |trainer - sampler| log-probability, the trainer's from its own scoring pass."""
    from clipo_ds.batching import collate, flatten_groups

    flat = flatten_groups(groups)
    batch = collate(flat, [[row] for row in range(len(flat))], 0)
    scored = policy.score(batch).logprobs.double()
    sampled = torch.zeros_like(scored)
    sampled[batch.response_mask] = torch.tensor([p for _, r in flat for p in r.logprobs], dtype=torch.float64)
    return float((scored - sampled)[batch.response_mask].abs().max())


@pytest.mark.parametrize(("ranks_", "arguments"), [(1, ["--model.lora.rank=4", "--rollout.stop=[=1]"]), (2, [])])
def test_training_end_to_end(tmp_path: Path, ranks_: int, arguments: list[str]) -> None:
    run_dir = tmp_path / "run"
    train(
        *SMALL, "--steps=2", "--rollout.engine=vllm", "--optimizer.learning_rate=1e-2", *arguments,
        f"--ds_config={Path(__file__).parents[1]}/ds_configs/zero3_cpu.json", f"--run_dir={run_dir}", ranks=ranks_,
    )  # fmt: skip
    rows = metrics(run_dir)
    assert len(rows) == 2
    assert all(0 < row["mismatch/max_abs"] < 1e-4 for row in rows)
    assert rows[0]["policy/grad_norm"] > 0
    responses = open_run(run_dir).rollouts(step=1, columns=["response"])["response"].to_pylist()
    assert any("=1" in response for response in responses) == (ranks_ == 2)


def test_two_ranks_hold_one_engine_and_keep_their_own_results(tmp_path: Path) -> None:
    done = run("../tests/tensor_parallel.py", str(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("*.done")} == {"rank0.done", "rank1.done"}
