"""Every kind of causal model is right in sampler and trainer, or refused in one line; and none trains with noise."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
import transformers
from small_policy import VOCABULARY, make_batch, make_policy

from clipo_ds.checks import check_model
from clipo_ds.models import ModelFacts, inspect_model
from clipo_ds.noise import Silence
from clipo_ds.schema import LoraConfig, ModelConfig
from clipo_ds.scoring import ScoringModule
from clipo_ds.start_check import check_policy
from clipo_ds.types import InputError
from clipo_ds.warm_start import build_tokenizer

_spec = importlib.util.spec_from_file_location(
    "check_models", Path(__file__).parents[1] / "scripts" / "check_models.py"
)
sweep = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = sweep  # where dataclasses look their module up
_spec.loader.exec_module(sweep)

# Each kind of noise: dropout modules, functional dropout by configuration or attribute, layers left out, jitter.
NOISY = {
    "granite": {"attention_dropout": 0.1},
    "gpt2": {},
    "opt": {"layerdrop": 0.3},
    "xglm": {"layerdrop": 0.3},
    "seed_oss": {},
    "biogpt": {},
    "gpt_bigcode": {},
    "phimoe": {"router_jitter_noise": 0.01, "input_jitter_noise": 0.1},
}
# One of each way: caches of slots, of waves, the library's own; heads that scale and cap; decoders found in their own
# way; masks of their own; a clamp in full passes only; states that no position tells of.
KINDS = [
    "llama", "gpt2", "bloom", "lfm2", "gemma2", "gpt_oss", "qwen3_next", "mamba", "recurrent_gemma", "deepseek_v4",
    "deepseek_v32", "doge", "minicpm3", "inkling_text", "llama4_text", "zamba2", "hrm_text", "gemma3", "openai-gpt",
]  # fmt: skip


def save(family: str, folder: Path, **changes: object) -> str:
    torch.manual_seed(0)
    config = sweep.tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NOISY)
def test_the_first_update_of_a_noisy_model_moves_from_the_policy_that_was_scored(family, ranks, tmp_path):
    folder = save(family, tmp_path, **NOISY[family])
    batch = make_batch()
    for checkpointing in (False, True):
        policy = make_policy(folder, ranks, stage=0, gradient_checkpointing=checkpointing)
        check_policy(policy, ModelConfig(path=folder, dtype="float32"))
        old = policy.score(batch).logprobs
        runs = count_layer_runs(policy.model)
        new = policy.forward(batch).logprobs
        ratio = (new.detach() - old).exp()
        assert float((ratio - 1 - ratio.log()).max()) < 1e-12  # policy/kl_old, k3
        policy.backward(-new.sum() / 10, last=True)
        assert len(runs) == (4 if checkpointing else 2)  # of two layers, each run again for its gradient or not
        assert policy.step() > 0 and not policy.draws_noise


def count_layer_runs(model: torch.nn.Module) -> list[str]:
    runs: list[str] = []
    layers = [m for m in model.modules() if isinstance(m, transformers.modeling_layers.GradientCheckpointingLayer)]
    for layer in layers:
        forward = layer.forward
        layer.forward = lambda *args, _forward=forward, **kwargs: runs.append("") or _forward(*args, **kwargs)
    return runs


def test_noise_that_is_kept_is_said_and_drawn(ranks, tmp_path, caplog):
    folder = save("gpt2", tmp_path)
    with caplog.at_level(logging.WARNING):
        policy = make_policy(folder, ranks, stage=0, dropout="keep")
    assert "model.dropout keep" in caplog.text and policy.draws_noise
    batch = make_batch()
    assert (policy.forward(batch).logprobs - policy.score(batch).logprobs).abs().max() > 0.1


def test_an_adapter_s_own_dropout_stays_its_own_field(ranks, tmp_path):
    folder = save("gpt2", tmp_path)
    lora = LoraConfig(rank=4, dropout=0.5, target_modules=["c_attn"])
    policy = make_policy(folder, ranks, stage=0, lora=dataclasses.replace(lora, dropout=0.0))
    assert not policy.draws_noise
    policy = make_policy(folder, ranks, stage=0, lora=lora)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    batch = make_batch()
    assert policy.draws_noise
    assert (policy.forward(batch).logprobs - policy.score(batch).logprobs).abs().max() > 0.1


def test_code_that_came_with_a_model_stays_in_training_mode_without_its_rates() -> None:
    class Own(transformers.GPT2LMHeadModel):
        """As from a folder: of a module that is not transformers' own."""

    torch.manual_seed(0)
    model = Own(sweep.tiny_config("gpt2"))
    module = ScoringModule(model, 7).train()
    Silence(model, model).begin()
    batch = make_batch()
    assert model.training
    assert torch.equal(module(batch)[0], module(batch)[0])


# -- heads -------------------------------------------------------------------------------------------------------------


def test_a_model_whose_logits_are_not_its_head_s_is_refused_at_the_start(ranks, tmp_path, monkeypatch):
    folder = save("llama", tmp_path)
    policy = make_policy(folder, ranks, stage=3)
    check_policy(policy, ModelConfig(path=folder, dtype="float32"))
    policy.model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 4,))
    with pytest.raises(InputError, match=r"`model.path` must be a model whose logits are its output head's"):
        check_policy(policy, ModelConfig(path=folder, dtype="float32"))


def test_a_model_that_sees_what_comes_after_is_refused_at_the_start(ranks, tmp_path):
    folder = save("llama", tmp_path)
    policy = make_policy(folder, ranks, stage=0)
    # As an encoder does: a token's state holds something of the last one's.
    policy.model.model.norm.register_forward_hook(lambda _, inputs, states: states + states[:, -1:])
    with pytest.raises(InputError, match=r"must be a causal language model, got .* with the tokens that come after"):
        check_policy(policy, ModelConfig(path=folder, dtype="float32"))


# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_a_kind_of_model_is_right_in_sampler_and_trainer(family):
    finding = sweep.check(family)
    assert finding.verdict == "right", finding
    assert f"| `{family}` | right |" in sweep.DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.BertConfig(is_decoder=True), "a bert model, which reads its text in both directions"),
        (transformers.BartConfig(), "a bart model, which is an encoder with a decoder"),
        (transformers.RwkvConfig(), "a rwkv model, which rewrites its weights"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_by_name_before_its_weights(tmp_path, config, why):
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=why):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_a_quantised_folder_is_refused_by_its_format(tmp_path, settings, name):
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(InputError, match=rf"`model.path` must be a model with plain weights .* \({name}\)") as caught:
        inspect_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_model_that_transformers_cannot_checkpoint_is_refused_by_the_field():
    facts = ModelFacts(transformers.CTRLConfig(), build_tokenizer(), "folder")
    check_model(ModelConfig(gradient_checkpointing=False), facts)
    with pytest.raises(InputError, match=r"`model.gradient_checkpointing` must be false for a ctrl model"):
        check_model(ModelConfig(), facts)


def test_a_decoder_that_projects_its_states_pools_what_its_head_reads(ranks, tmp_path):
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    policy = make_policy(str(tmp_path), ranks, stage=3)
    assert policy.hidden_size == policy.score(make_batch()).pooled.shape[1] == 16
