"""Which of transformers' causal types this program trains, and why it refuses the others.

What is said here is what scripts/check_models.py measured (docs/models.md is its table): tiny random models of every
type of the installed transformers, in sampler and trainer, against their own plain logits. Layer L2: imports torch and
transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# They see what comes after a token too, whatever `is_decoder` says of heads that were trained to fill in blanks.
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xlnet", "xmod",
)  # fmt: skip
REFUSED = dict.fromkeys(ENCODERS, "reads its text in both directions") | {
    "gemma4_assistant": "drafts for another model and is no language model by itself",
    "gemma4_unified_assistant": "drafts for another model and is no language model by itself",
    "git": "writes about an image",
    "modernbert-decoder": "transforms its hidden states between decoder and output head",
    "musicgen": "writes codes of sound",
    "musicgen_melody": "writes codes of sound",
    "reformer": "hashes its tokens at random in every pass",
    "rwkv": "rewrites its weights when it goes from training to sampling",
    "trocr": "reads an image and is only the decoder of it",
}


def why_refused(config: PreTrainedConfig) -> str | None:
    """Why a model of this configuration cannot be trained here as what it is; None where nothing speaks against it.

    >>> from transformers import BartConfig, BertConfig, LlamaConfig
    >>> why_refused(BertConfig()), why_refused(LlamaConfig())
    ('reads its text in both directions', None)
    >>> why_refused(BartConfig())
    'is an encoder with a decoder'
    """
    if config.is_encoder_decoder:
        return "is an encoder with a decoder"
    return REFUSED.get(config.model_type)


def quantisation(config: PreTrainedConfig) -> str | None:
    """The format that a model's weights are quantised in, as its configuration names it; None for plain weights."""
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("quantization_config", "compression_config"):
            settings: Any = getattr(part, name, None)
            if settings:
                entries = settings if isinstance(settings, dict) else vars(settings)
                method = entries.get("quant_method") or entries.get("format") or "an unnamed format"
                return str(getattr(method, "value", method))
    return None


def is_own_code(model: nn.Module) -> bool:
    """Whether a model's code came with its weights, so that nothing is known of it."""
    return not type(model).__module__.startswith("transformers.")


def unclamp_time_steps(model: PreTrainedModel) -> None:
    """Take out a clamp of the time steps that transformers' Nemotron-H and Zamba2 have in full passes only.

    Their decoding with a cache and vLLM leave the steps as they are (log-probabilities of tiny random models differ by
    0.03); what the configuration itself says (`time_step_limit`) stays.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "time_step_limit", (0.0, float("inf")))
    for module in model.modules():
        if isinstance(getattr(module, "time_step_limit", None), tuple):
            module.time_step_limit = tuple(limit)
