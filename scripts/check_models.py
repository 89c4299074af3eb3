"""Hold every causal type of the installed transformers against its own plain logits, in sampler and trainer.

    python scripts/check_models.py                  # all types; writes docs/models.md
    python scripts/check_models.py llama mamba      # some; prints only

Every model is tiny and random, with noise in its configuration. Plain logits are those of one rollout alone, without
padding or cache.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clipo_ds.batching import collate
from clipo_ds.families import unclamp_time_steps, why_refused
from clipo_ds.generation import TransformersEngine
from clipo_ds.noise import RATES, Silence
from clipo_ds.scoring import ScoringModule, takes_pair_mask
from clipo_ds.types import Prompt, Rollout
from clipo_ds.warm_start import build_tokenizer

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
VOCABULARY = 64
LIMIT = 1e-4  # of rounding, in log-probabilities
# Whatever a configuration calls its sizes, its tokens and its rates of noise.
SIZES = {
    "vocab_size": VOCABULARY, "n_words": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "hidden_size": 32, "d_model": 32,
    "n_embd": 32, "emb_dim": 32, "intermediate_size": 48, "n_inner": 48, "d_ff": 48, "ffn_dim": 48, "dff": 48,
    "d_inner": 48, "dim_ff": 48, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "dim_head": 8, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "attention_heads": 4,
    "sliding_window": 8, "attention_chunk_size": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 16, "index_topk": 4, "index_topk_blocks": 1,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16, "n_mamba_heads": 8,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "chunk_size": 16, "n_groups": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
}  # fmt: skip
RECURRENT = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
# What single types want otherwise.
SPECIAL: dict[str, dict[str, object]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"head_dim": 16, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8},
    "diffllama": {"attention_dropout": 0.0},  # which refuses another
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2, "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
        "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "inkling_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 8,
        "rel_extent": 16, "d_rel": 4, "layer_types": ["hybrid_sliding", "hybrid"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": RECURRENT,
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION | {"num_dense_layers": 1},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"dim_model_base": 8},
    # transformers counts the columns of its cache by the first layer, which holds none where it is linear.
    "minimax": RECURRENT | {"block_size": 16, "sliding_window": None},
    "minimax_m3_vl_text": {"dense_intermediate_size": 48, "shared_intermediate_size": 16, "index_block_size": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "moe_shared_expert_intermediate_size": 16},
    "olmo_hybrid": RECURRENT,
    "qwen3_5_moe_text": RECURRENT,
    "qwen3_5_text": RECURRENT,
    "qwen3_next": RECURRENT,
    "qwen4_exp_text": RECURRENT | {
        "ple_embed_dim": 8, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "hc_lowrank": 8,
        "split_ngram_parts": 2, "indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 16, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "xlstm": {"hidden_size": 128, "num_heads": 2},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4, "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
# Types of several parts (images, sound), of which the text's is what is trained, by the type of that part.
TEXT_PARTS = {
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text", "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "qwen4_exp": "qwen4_exp_text",
}  # fmt: skip
UNMADE = {  # of which no tiny one can be made from a configuration alone, or not here
    "blt": "made of four networks over bytes", "cohere_compass_text": "transformers cannot initialise it",
    "emu3": "made of a tokenizer for images and a language model", "gemma3n": "wants the package timm",
    "got_ocr2": "reads images", "mllama": "reads images", "phi4_multimodal": "reads images and sound",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What was found of one type."""

    family: str
    verdict: str
    sampler: float | None = None  # largest difference to plain log-probabilities
    trainer: float | None = None
    reason: str = ""

    def row(self) -> str:
        """Its row of the table."""
        numbers = ["" if v is None else f"{v:.0e}" for v in (self.sampler, self.trainer)]
        return f"| `{self.family}` | {self.verdict} | {' | '.join(numbers)} | {self.reason} |"


def tiny_config(family: str) -> PreTrainedConfig:
    """A small configuration of a type, with noise wherever it has a rate for it."""
    kind = CONFIG_MAPPING[family]
    if family in TEXT_PARTS:
        parts = {"vision_config": tiny_vision(kind)} if family.startswith("gemma") else {}
        return kind(text_config=tiny_config(TEXT_PARTS[family]).to_dict(), **parts)
    names = _fields(kind)
    sizes = SIZES | ({"num_key_value_heads": 4} if "kv_lora_rank" in names else {})
    values: dict[str, object] = {name: value for name, value in sizes.items() if name in names}
    values |= {name: 0.1 for name in names if name.endswith(RATES)}
    return kind(**(values | SPECIAL.get(family, {})))


def tiny_vision(kind: type) -> object:
    """A small configuration of the part that sees, which no test here uses."""
    part = kind.sub_configs["vision_config"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}  # fmt: skip
    names = _fields(part) if part.__name__ != "AutoConfig" else set()
    if not names:
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
        return {"model_type": "siglip_vision_model", "patch_size": 14} | {key: sizes[key] for key in keys}
    return {name: value for name, value in sizes.items() if name in names}


def tiny_model(family: str) -> PreTrainedModel:
    """A random model of a type, far from uniform, so that a wrong mask or scale shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=min(0.4, 2 / parameter.shape[-1] ** 0.5))
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    unclamp_time_steps(model)
    return model


def check(family: str) -> Finding:
    """Make a model of a type and hold it against its plain logits."""
    if family in UNMADE:
        return Finding(family, "not measured", reason=UNMADE[family] + "; the check at a run's start decides")
    try:
        config = tiny_config(family)
    except (
        TypeError,
        ValueError,
        AttributeError,
        StrictDataclassError,
    ):  # of several parts that are refused as a whole
        config = CONFIG_MAPPING[family]
    kind = config if isinstance(config, PreTrainedConfig) else _bare(config)
    if (why := why_refused(kind)) is not None:
        return Finding(family, "refused", reason=f"it {why}")
    model = tiny_model(family)
    engine = TransformersEngine(copy.deepcopy(model), build_tokenizer(), stop_ids=())
    sampler, trainer = sampler_difference(model, engine), trainer_difference(model)
    notes = [
        *([] if engine.fits_fast_cache else ["sampled with transformers' own `generate`"]),
        *([] if model.supports_gradient_checkpointing else ["`model.gradient_checkpointing` must be false"]),
        *(["one copy of a prompt for its rollouts"] if takes_pair_mask(model) else []),
    ]
    right = max(sampler, trainer) <= LIMIT
    return Finding(family, "right" if right else "WRONG", sampler, trainer, ", ".join(notes))


def sampler_difference(model: PreTrainedModel, engine: TransformersEngine) -> float:
    """Largest difference between what the sampler says of its tokens and the plain logits."""
    groups = engine.generate(_prompts(), 2, max_new_tokens=14, seed=5)
    return max(
        float((torch.tensor(r.logprobs).double() - plain(model, group.prompt, r.token_ids)).abs().max())
        for group in groups
        for r in group.rollouts
    )


def trainer_difference(model: PreTrainedModel) -> float:
    """The same of the trainer, in training mode, each rollout alone in its row and (where it may) behind one prompt."""
    generator = torch.Generator().manual_seed(4)
    flat = [
        (prompt, Rollout(_tokens(generator, length), (0.0,) * length, "", False))
        for prompt, length in itertools.product(_prompts(), (9, 13))
    ]
    trained = copy.deepcopy(model)
    if model.supports_gradient_checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    silence, module = Silence(trained, trained), ScoringModule(trained, 7)
    layouts = [[[row] for row in range(len(flat))], *([[[0, 1], [2, 3], [4, 5]]] if takes_pair_mask(trained) else [])]
    largest = 0.0
    for layout in layouts:
        module.train()
        silence.begin()
        scored = module(collate(flat, layout, 0), with_entropy=False)[0]
        scored.sum().backward()
        for row, (prompt, rollout) in enumerate(flat):
            own = plain(model, prompt, rollout.token_ids)
            largest = max(largest, float((scored[row, : len(own)].detach() - own).abs().max()))
    return largest


@torch.no_grad()
def plain(model: PreTrainedModel, prompt: Prompt, response: tuple[int, ...]) -> Tensor:
    """Log-probabilities of a response by one forward of the model itself, without padding or cache."""
    ids = torch.tensor([[*prompt.token_ids, *response]])
    rows = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].double().log_softmax(-1)
    return rows.gather(-1, torch.tensor(response)[:, None])[:, 0]


def write_table(findings: list[Finding]) -> None:
    """Write docs/models.md."""
    count = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ("right", "refused", "not measured")}
    head = [
        "# Which models",
        "",
        f"All {len(findings)} causal types of transformers {transformers.__version__}, as tiny random models in "
        "float32: the largest difference between the log-probabilities of",
        "the sampler and of the trainer (training mode, gradient checkpointing, noise in the configuration) and the "
        "model's own plain logits.",
        f"{count['right']} are right (below {LIMIT:g}), {count['refused']} are refused by name before any weight is "
        f"loaded, {count['not measured']} were not measured. Whatever the type, a run",
        "holds a short batch against the model's own logits before its first step, and stops where they differ. "
        "Written by `python scripts/check_models.py`.",
        "",
        "| type | verdict | sampler | trainer | how, or why not |",
        "|---|---|---|---|---|",
    ]
    DOCS.write_text("\n".join([*head, *(finding.row() for finding in findings), ""]), encoding="utf-8")


def _prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    return [Prompt(uid, "", _tokens(generator, length), "", "") for uid, length in enumerate((5, 12, 9))]


def _tokens(generator: torch.Generator, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())


def _fields(kind: type) -> set[str]:
    """Names that a configuration takes, without those that all of them do."""
    found = {"pad_token_id", "bos_token_id", "eos_token_id"}
    for part in itertools.takewhile(lambda part: part is not PreTrainedConfig, kind.__mro__):
        found |= set(getattr(part, "__annotations__", {}))
        if "__init__" in vars(part) and not is_dataclass(part):
            found |= set(inspect.signature(part.__init__).parameters)
    return found


def _bare(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """What is known of a type without making it: its name, and whether it has an encoder."""
    config = PreTrainedConfig(is_encoder_decoder=bool(getattr(kind, "is_encoder_decoder", False)))
    config.model_type = kind.model_type
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "families", nargs="*", help="model types; all where none is given, and then the table is written"
    )
    asked = parser.parse_args().families
    transformers.logging.set_verbosity_error()
    findings = []
    for family in asked or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            findings.append(check(family))
        except Exception as error:  # whatever a model of another make does, the sweep goes on and says it
            what = str(error).splitlines()[0][:90]
            findings.append(Finding(family, "WRONG", reason=f"{type(error).__name__}: {what}"))
        sys.stdout.write(findings[-1].row() + "\n")
        sys.stdout.flush()
    if not asked:
        write_table(findings)
    sys.exit(any(finding.verdict == "WRONG" for finding in findings))


if __name__ == "__main__":
    main()
