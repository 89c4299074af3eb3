"""The forward pass that everything learns from: decoder, pooling and token head of a causal language model.

Layer L2: imports torch, transformers, PEFT and `clipo_ds.token_head`.
"""

from __future__ import annotations

import inspect

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from clipo_ds.token_head import TokenHead, logit_shaping
from clipo_ds.types import Batch, InputError


class ScoringModule(nn.Module):
    """The module that the DeepSpeed engine trains: decoder, pooling and token head in one forward."""

    def __init__(self, model: nn.Module, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        plain = plain_model(model)
        output = plain.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            raise InputError(
                "`model.lora.target_modules` must leave the output head alone, got an adapter on it"
                if isinstance(model, PeftModel)
                else f"`model.path` must have a linear output head, got {type(output).__name__}"
            )
        self.hidden_size = output.in_features  # not always the configuration's: a decoder may project its states
        self.token_head = TokenHead(output, chunk_tokens, logit_shaping(plain.config))

    def forward(
        self, batch: Batch, with_entropy: bool = True, pooled_gradient: bool = False, from_logits: bool = False
    ) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """Give the fields of `Scores` for a micro-batch on this rank's device.

        Pooled and projected are the states that produced the response's tokens, end-of-sequence token included. With
        `from_logits` only the log-probabilities, as the model's own forward pass has them: each rollout alone in its
        sequence, and the logits of all tokens in memory.
        """
        plain = plain_model(self.model)
        row, step = batch.response_mask.nonzero(as_tuple=True)
        blank = torch.zeros(batch.response_mask.shape, device=batch.input_ids.device)
        if from_logits:
            own = plain(input_ids=batch.input_ids, attention_mask=(batch.segments >= 0).long(), use_cache=False).logits
            log = own[batch.sequence[row], batch.state_columns[row, step]].float().log_softmax(-1)
            return blank.index_put((row, step), log.gather(-1, batch.response_ids[row, step][:, None])[:, 0])
        hidden = decoder_of(plain)(
            input_ids=batch.input_ids,
            attention_mask=_pair_mask(batch.segments) if batch.shares_prompts else (batch.segments >= 0).long(),
            position_ids=batch.position_ids if batch.shares_prompts else None,
            use_cache=False,
        ).last_hidden_state  # (R, S, H)
        place = batch.sequence[row] * hidden.shape[1] + batch.state_columns[row, step]
        # (M, H), M real response tokens. Rollouts that share a prompt share its last state. The gradient of
        # an embedding adds such rows up in one order, that of an index on a CPU in whichever its threads take.
        states = functional.embedding(place, hidden.flatten(0, 1))
        logprobs, entropies = self.token_head(states, batch.response_ids[row, step], with_entropy)
        counts = batch.response_mask.sum(1).clamp(min=1)
        pooled = states.new_zeros(len(blank), states.shape[-1], dtype=torch.float32)
        pooled = pooled.index_add(0, row, (states if pooled_gradient else states.detach()).float())
        return (
            blank.index_put((row, step), logprobs),
            blank.index_put((row, step), entropies),
            pooled / counts[:, None],
        )


def plain_model(model: nn.Module) -> transformers.PreTrainedModel:
    """The causal language model itself, without PEFT around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(plain: transformers.PreTrainedModel) -> nn.Module:
    """What gives a causal language model's hidden states."""
    decoder = plain.get_decoder()
    if decoder is not plain:
        return decoder
    # transformers finds none in some (Llama-4's text model): it is the part with the embeddings.
    embeddings = plain.get_input_embeddings()
    parts = (p for p in plain.children() if p is not embeddings and any(m is embeddings for m in p.modules()))
    return next(parts, decoder)


def takes_pair_mask(plain: transformers.PreTrainedModel) -> bool:
    """Whether rollouts may share a prompt: attention takes a mask over pairs, and nothing else mixes tokens."""
    config = plain.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        config._attn_implementation == "sdpa"
        and set(layers) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and not getattr(config, "alibi", False)
        and not getattr(plain, "_is_stateful", False)
        and type(plain).__module__.startswith("transformers.")
        and "position_ids" in inspect.signature(decoder_of(plain).forward).parameters
    )


def _pair_mask(segments: Tensor) -> Tensor:
    """Bool[R, 1, S, S], True where a token (third axis) sees another (last axis): the prompt, and its own response.

    Padding sees something too, since softmax over nothing is not a number; nobody sees padding.
    """
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    seen = segments[:, None, :]
    return (causal & ((seen == 0) | (seen == segments[:, :, None])))[:, None]
