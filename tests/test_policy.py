"""The training policy on a DeepSpeed engine of one rank, against plain transformers and autograd."""

from __future__ import annotations

import pytest
import torch
import transformers
from small_policy import VOCABULARY, make_batch, make_flat, make_policy, save_model

from clipo_ds.batching import collate
from clipo_ds.policy import ScoringModule
from clipo_ds.schema import LoraConfig, OptimizerConfig
from clipo_ds.types import Prompt, Rollout
from clipo_ds.weight_sync import iterate_adapter, iterate_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("policy"))


def plain_scores(folder: str, flat: list[tuple[Prompt, Rollout]]):
    """Rollout by rollout without padding, from transformers' own logits and states."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    longest = max(len(rollout.token_ids) for _, rollout in flat)
    logprobs, entropies = torch.zeros(len(flat), longest), torch.zeros(len(flat), longest)
    pooled = []
    for n, (prompt, rollout) in enumerate(flat):
        start, length = len(prompt.token_ids), len(rollout.token_ids)
        ids = torch.tensor([prompt.token_ids + rollout.token_ids])
        out = model(ids, output_hidden_states=True)
        columns = slice(start - 1, start + length - 1)  # where the response tokens were produced
        log = out.logits[0, columns].log_softmax(-1)
        logprobs[n, :length] = log.gather(-1, ids[0, start:, None])[:, 0]
        entropies[n, :length] = -(log.exp() * log).sum(-1)
        pooled.append(out.hidden_states[-1][0, columns].mean(0))
    return logprobs, entropies, torch.stack(pooled), model


# Six rollouts of two prompts: each alone, or those of a prompt behind one copy of it, whole or in unequal parts.
LAYOUTS = [[[0], [1], [2], [3], [4], [5]], [[0, 1, 2], [3, 4, 5]], [[3, 4], [0], [5], [1, 2]]]


@pytest.mark.parametrize("sequences", LAYOUTS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_scores_equal_plain_transformers_rollout_by_rollout(folder, ranks, stage, sequences):
    flat = make_flat(6, per_prompt=3)
    batch = collate(flat, sequences, 0)
    logprobs, entropies, pooled, _ = plain_scores(folder, [flat[row] for row in batch.rows])
    scores = make_policy(folder, ranks, stage=stage).score(batch)
    torch.testing.assert_close(scores.logprobs, logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy, entropies, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.pooled, pooled, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [[[[0], [1], [2], [3]], [[4]], [[5]]], [[[3, 4, 5], [0]], [[1, 2]]]])
@pytest.mark.parametrize(("stage", "checkpointing"), [(0, False), (3, False), (3, True)])
def test_one_update_in_micro_batches_equals_plain_autograd(folder, ranks, stage, checkpointing, cut):
    flat = make_flat(6, per_prompt=3)
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3, 0.7])
    logprobs, _, pooled, model = plain_scores(folder, flat)
    # a loss that uses both outputs, so that the embedding path is checked as well
    (-(logprobs * advantages[:, None]).sum() / 7 + pooled.square().sum() / 50).backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.step()
    policy = make_policy(folder, ranks, stage=stage, gradient_checkpointing=checkpointing)
    for position, sequences in enumerate(cut):
        part = collate(flat, sequences, 0)
        scores = policy.forward(part, pooled_gradient=True)
        weights = advantages[list(part.rows)][:, None]
        loss = -(scores.logprobs * weights).sum() / 7 + scores.pooled.square().sum() / 50
        policy.backward(loss, last=position == len(cut) - 1)
    assert policy.step() == pytest.approx(float(expected), rel=1e-4)
    trained = {name: weight.clone() for name, weight in iterate_weights(policy.model)}
    for name, weight in model.state_dict().items():
        # Adam's first step is lr * sign(g): where g is near 0 the sign may differ, nothing else may
        assert (trained[name] - weight).abs().gt(1e-4).float().mean() < 0.01, name


def test_the_gradient_of_a_shared_prompt_is_the_same_to_the_bit_each_time(folder):
    """Its last state leads to the first token of every rollout, and on a CPU two threads may add up their gradients."""
    prompt = make_flat(1, per_prompt=1)[0][0]
    flat = [(prompt, Rollout((n % 50 + 3,), (0.0,), "r", False)) for n in range(2048)]
    batch = collate(flat, [list(range(len(flat)))], 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    module, before = ScoringModule(model, 4096), torch.get_num_threads()
    torch.set_num_threads(2)
    seen = set()
    try:
        for _ in range(10):
            module.zero_grad()
            module(batch, with_entropy=False)[0].sum().backward()
            seen.add(model.get_input_embeddings().weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


SHAPED = [  # models that scale or cap their logits after the output head
    (transformers.GraniteConfig, {"logits_scaling": 8.0}),
    (transformers.CohereConfig, {"logit_scale": 0.25}),
    (transformers.Gemma2Config, {"final_logit_softcapping": 5.0, "head_dim": 8}),
    (
        transformers.FalconH1Config,
        {"lm_head_multiplier": 0.25, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    ),
]


@pytest.mark.parametrize(("kind", "own"), SHAPED)
def test_logits_are_shaped_as_the_model_shapes_them(kind, own):
    torch.manual_seed(0)
    config = kind(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=1.0, **own,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompt, rollout = make_flat(1)[0]
    ids = torch.tensor([prompt.token_ids + rollout.token_ids])
    log = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].log_softmax(-1)
    expected = log.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
    scored = ScoringModule(model, 4096)(collate([(prompt, rollout)], [[0]], 0))[0][0]
    torch.testing.assert_close(scored, expected, atol=1e-4, rtol=1e-4)


def test_prompts_are_shared_only_where_attention_takes_a_mask_of_pairs(folder, ranks, tmp_path):
    assert make_policy(folder, ranks, stage=0).pairs_per_token == 6 * 32
    assert make_policy(folder, ranks, stage=0, attn_implementation="eager").pairs_per_token == 0
    sliding = transformers.MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    transformers.MistralForCausalLM(sliding).save_pretrained(tmp_path)
    assert make_policy(str(tmp_path), ranks, stage=0).pairs_per_token == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_lora_starts_as_its_reference_and_leaves_it(folder, ranks, stage):
    batch = make_batch()
    policy = make_policy(folder, ranks, stage=stage, lora=LoraConfig(rank=4))
    reference = policy.score_reference(batch)
    torch.testing.assert_close(policy.score(batch).logprobs, reference)
    policy.backward(-policy.forward(batch).logprobs.sum() / 10, last=True)
    policy.step()
    assert (policy.score(batch).logprobs - reference).abs().max() > 1e-3
    torch.testing.assert_close(policy.score_reference(batch), reference)


def test_full_policy_keeps_a_frozen_reference(folder, ranks):
    batch = make_batch()
    policy = make_policy(folder, ranks, stage=3)
    reference = policy.score_reference(batch)
    policy.backward(-policy.forward(batch).logprobs.sum() / 10, last=True)
    policy.step()
    torch.testing.assert_close(policy.score_reference(batch), reference)
    assert (policy.score(batch).logprobs - reference).abs().max() > 1e-3


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_non_finite_gradient_raises_and_changes_no_weight(folder, ranks, stage):
    policy = make_policy(folder, ranks, stage=stage)
    before = {name: weight.clone() for name, weight in iterate_weights(policy.model)}
    policy.backward(policy.forward(make_batch()).logprobs.sum() * float("nan"), last=True)
    with pytest.raises(FloatingPointError):
        policy.step()
    for name, weight in iterate_weights(policy.model):
        assert torch.equal(weight, before[name]), name
    # and the engine goes on
    policy.backward(-policy.forward(make_batch()).logprobs.sum() / 10, last=True)
    assert policy.step() > 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    # two steps up from 0 to 0.01; linear then falls to 0 at the tenth update: 0.01 * 7 / 8 at the third
    [("constant", [0.0, 0.005, 0.01, 0.01]), ("linear", [0.0, 0.005, 0.01, 0.00875])],
)
def test_learning_rate_warms_up_under_every_schedule(folder, ranks, schedule, expected):
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule=schedule, warmup_steps=2)
    policy = make_policy(folder, ranks, stage=0, optimizer=optimizer)
    seen = [policy.learning_rate]
    for _ in range(3):
        policy.backward(-policy.forward(make_batch()).logprobs.sum() / 10, last=True)
        policy.step()
        seen.append(policy.learning_rate)
    assert seen == pytest.approx(expected)


def test_the_next_update_takes_its_learning_rate_from_the_schedule_and_not_from_a_checkpoint(folder, ranks):
    policy = make_policy(folder, ranks, stage=0, optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear"))
    policy.engine.optimizer.param_groups[0]["lr"] = 0.0  # as after the last update of a shorter run
    policy.renew_learning_rate()
    assert policy.learning_rate == 1e-2


@pytest.mark.parametrize("byte_budget", [1, 10_000, 10**9])
def test_weights_leave_under_plain_names_whatever_the_byte_budget(folder, ranks, byte_budget):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = make_policy(folder, ranks, stage=3)
    sent = {name: weight.clone() for name, weight in iterate_weights(policy.model, byte_budget=byte_budget)}
    assert sent.keys() == plain.state_dict().keys()  # the tied head too
    for name, weight in plain.state_dict().items():
        assert torch.equal(sent[name], weight), name


def test_merged_lora_weights_equal_peft_and_a_hundred_syncs_change_nothing(folder, ranks):
    policy = make_policy(folder, ranks, stage=3, lora=LoraConfig(rank=4))
    policy.backward(-policy.forward(make_batch()).logprobs.sum() / 10, last=True)
    policy.step()
    sent = {name: weight.clone() for name, weight in iterate_weights(policy.model)}
    for _ in range(100):
        again = {name: weight.clone() for name, weight in iterate_weights(policy.model)}
    assert all(torch.equal(sent[name], again[name]) for name in sent)
    factors = {name: weight.clone() for name, weight in iterate_adapter(policy.model)}
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in sent.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.default.weight" not in factors:
            assert torch.equal(weight, base[name])
            continue
        up, down = factors[f"{prefix}.lora_B.default.weight"], factors[f"{prefix}.lora_A.default.weight"]
        torch.testing.assert_close(weight, base[name] + 32 / 4 * up @ down)
