"""A policy leaves the trainer under the names, and in the pieces, of the folder that its model was published in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from launching import SMALL
from mixtures import EXPERTS, OTHERS, make_mixture, saved_weights
from small_policy import make_policy

from clipo_ds.checkpoint import save_model
from clipo_ds.checks import check_model
from clipo_ds.config import load_config
from clipo_ds.distributed import Ranks
from clipo_ds.models import inspect_model, load_causal_lm, weight_shapes
from clipo_ds.schema import LoraConfig, ModelConfig
from clipo_ds.types import InputError
from clipo_ds.vllm_checks import check_vllm
from clipo_ds.warm_start import build_tokenizer
from clipo_ds.weight_sync import iterate_original_weights


@pytest.mark.parametrize("family", [*EXPERTS, *OTHERS])
def test_weights_are_those_of_the_folder_by_name_and_value(family: str, tmp_path: Path) -> None:
    make_mixture(family, tmp_path)
    saved, model = saved_weights(tmp_path), load_causal_lm(str(tmp_path), dtype="float32")
    sent = {name: tensor.clone() for name, tensor in iterate_original_weights(model, byte_budget=1)}
    assert sent.keys() == saved.keys() != dict(model.named_parameters()).keys()
    assert all(torch.equal(sent[name], tensor) for name, tensor in saved.items())
    assert weight_shapes(str(tmp_path)) == {name: tensor.shape for name, tensor in saved.items()}


@pytest.mark.parametrize("family", EXPERTS)
def test_a_checkpoint_of_a_mixture_is_a_plain_folder_like_the_original(
    family: str, ranks: Ranks, tmp_path: Path
) -> None:
    plain = make_mixture(family, tmp_path / "original")
    policy = make_policy(str(tmp_path / "original"), ranks, stage=3)
    save_model(tmp_path / "saved", policy, build_tokenizer(), ranks)
    original, saved = saved_weights(tmp_path / "original"), saved_weights(tmp_path / "saved")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in original.items())
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(2, 14)[None]
    assert torch.equal(again(ids).logits, plain(ids).logits)


def test_lora_on_a_mixture_says_what_it_adapts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_mixture("qwen3_moe", tmp_path)
    facts = inspect_model(str(tmp_path))
    check_model(ModelConfig(path=str(tmp_path), lora=LoraConfig()), facts)
    (line,) = caplog.messages
    assert "model.lora adapts k_proj, o_proj, q_proj, v_proj alone; the experts, " in line
    config = load_config(
        "demo", [*SMALL[1:], "--model.lora.rank=4", "--rollout.vllm.lora=adapter", "--rollout.engine=vllm"]
    )
    with pytest.raises(InputError, match=r"`rollout.vllm.lora` must be merged for a mixture of experts"):
        check_vllm(config, facts.config, Ranks(0, 1, 0, torch.device("cpu")), 8)
