"""A LoRA run that starts from an adapter goes on with it; what cannot be gone on with is refused by the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from small_policy import make_batch, make_policy, save_model

from clipo_ds import checkpoint
from clipo_ds.checks import check_model
from clipo_ds.models import ModelFacts, inspect_model, load_causal_lm
from clipo_ds.policy import peft_config
from clipo_ds.schema import LoraConfig, ModelConfig
from clipo_ds.types import InputError
from clipo_ds.warm_start import build_tokenizer
from clipo_ds.weight_sync import iterate_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("policy"))


def save_adapter(base: str, folder, **lora: object) -> str:
    """An adapter whose update is far from nothing."""
    plain = load_causal_lm(base, dtype="float32")
    model = get_peft_model(plain, peft_config(LoraConfig(**lora)), autocast_adapter_dtype=False)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_lora_run_goes_on_with_the_adapter_it_starts_from_and_keeps_it(folder, ranks, tmp_path, stage):
    adapter = save_adapter(folder, tmp_path / "a", rank=4, alpha=8.0)
    policy = make_policy(adapter, ranks, stage=stage, lora=LoraConfig(rank=4, alpha=8.0))
    start = load_causal_lm(adapter, dtype="float32").state_dict()
    for name, weight in iterate_weights(policy.model):
        assert torch.allclose(weight, start[name], atol=1e-6), name
    batch = make_batch()
    # The reference is the start of the run, which is not the base.
    reference = policy.score_reference(batch)
    assert torch.allclose(policy.score(batch).logprobs, reference, atol=1e-5)
    policy.backward(-policy.forward(batch).logprobs.sum() / 10, last=True)
    policy.step()
    assert not torch.allclose(policy.score(batch).logprobs, reference, atol=1e-3)
    assert torch.equal(policy.score_reference(batch), reference)
    checkpoint.save_model(tmp_path / "saved", policy, build_tokenizer(), ranks)
    again = load_causal_lm(str(tmp_path / "saved"), dtype="float32").state_dict()
    for name, weight in iterate_weights(policy.model):
        assert torch.allclose(weight, again[name], atol=1e-5), name


def facts_of(adapter: str) -> ModelFacts:
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(settings["base_model_name_or_path"])
    return ModelFacts(config, build_tokenizer(), adapter, settings)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "`model.lora.rank` must be 4, as in the adapter"),
        ({"alpha": 16.0}, "`model.lora.alpha` must be 8.0, as in the adapter"),
        ({"target_modules": ["q_proj"]}, r"`model.lora.target_modules` must be .*, as in the adapter"),
    ],
)
def test_an_adapter_of_another_shape_is_refused_by_the_field(folder, tmp_path, lora, message):
    adapter = save_adapter(folder, tmp_path, rank=4, alpha=8.0)
    fitting = {"rank": 4, "alpha": 8.0}
    check_model(ModelConfig(path=adapter, lora=LoraConfig(**fitting)), facts_of(adapter))
    with pytest.raises(InputError, match=message):
        check_model(ModelConfig(path=adapter, lora=LoraConfig(**(fitting | lora))), facts_of(adapter))


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_an_adapter_that_moved_its_base_is_merged_where_that_can_be_told_and_never_gone_on_with(
    folder, tmp_path, start
):
    plain = load_causal_lm(folder, dtype="float32")
    settings = peft_config(LoraConfig(rank=4, alpha=8.0))
    settings.init_lora_weights = start
    model = get_peft_model(plain, settings, autocast_adapter_dtype=False)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
        trained = model(ids).logits
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    lora = ModelConfig(path=str(tmp_path), lora=LoraConfig(rank=4, alpha=8.0))
    with pytest.raises(InputError, match=rf"`model.path` must be an adapter that left its base alone.*'{start}'"):
        check_model(lora, facts_of(str(tmp_path)))
    if start != "pissa_niter_4":  # begun from random numbers
        inspect_model(str(tmp_path))
        merged = load_causal_lm(str(tmp_path), dtype="float32")(ids).logits
        assert torch.allclose(merged, trained, atol=1e-4)
        return
    with pytest.raises(InputError, match=r"`model.path` must be an adapter on a base as it was saved.*pissa_niter_4"):
        inspect_model(str(tmp_path))


def test_an_adapter_that_is_more_than_lora_is_refused(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path)
    facts = facts_of(adapter)
    assert facts.adapter is not None
    facts.adapter["use_dora"] = True
    with pytest.raises(InputError, match=r"`model.path` must be a plain LoRA adapter .* got one with use_dora True"):
        check_model(ModelConfig(path=adapter, lora=LoraConfig()), facts)
