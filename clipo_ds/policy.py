"""The training policy: a causal language model on a DeepSpeed engine, full or with LoRA adapters.

`Policy.score` and `Policy.forward` give log-probabilities, entropy and pooled hidden states of a micro-batch from one
pass through the decoder (`clipo_ds.scoring`). The vocabulary projection is one module (`clipo_ds.token_head`), so that
ZeRO-3 gathers the output weight once a pass, however many chunks a rank has.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import deepspeed
import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import get_scheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from clipo_ds.models import base_folder, load_causal_lm
from clipo_ds.noise import Silence, has_noise
from clipo_ds.schema import LoraConfig, ModelConfig, OptimizerConfig
from clipo_ds.scoring import ScoringModule, plain_model, takes_pair_mask
from clipo_ds.types import Batch, InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What one pass says about the N rollouts of a micro-batch."""

    logprobs: Tensor  # Float[N, T], natural log, 0 where the response mask is False
    entropy: Tensor  # Float[N, T], nats, 0 where the response mask is False; no gradient flows through it
    pooled: Tensor  # Float[N, H], float32: mean of the final-norm states that produced the response tokens


class Policy:
    """A DeepSpeed engine around a `ScoringModule`, and the frozen reference policy where a KL term wants one."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        model: nn.Module,
        reference: nn.Module | None,
        silence: Silence | None,
    ) -> None:
        self.engine = engine
        self.model = model
        self.updates_begun = 0  # optimiser steps that may have changed a weight, also those that did not come to an end
        self._reference = reference
        self._silence = silence
        # Whether a forward in training draws random numbers, and so differs from scoring.
        self.draws_noise = has_noise(model) if silence is None else silence.leaves_noise

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    @property
    def hidden_size(self) -> int:
        return int(self.engine.module.hidden_size)

    @property
    def has_tied_head(self) -> bool:
        """Whether the output head is the embedding matrix."""
        return bool(self.model.config.get_text_config().tie_word_embeddings)

    @property
    def pairs_per_token(self) -> float:
        """Pairs of query and key in attention that cost as much as the rest of the network for one token.

        A layer of width H spends about 24 H^2 operations on a token (projections and a feed-forward part of four times
        the width) and 4 H on a pair. 0 where the rollouts of a prompt cannot share it: attention must take a mask over
        pairs of tokens, and nothing but attention may carry from one token to the next.
        """
        return 6.0 * self.hidden_size if takes_pair_mask(plain_model(self.model)) else 0.0

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Score a micro-batch under the current policy, without gradients."""
        self.engine.eval()
        return Scores(*self.engine(on_device(batch, self.device)))

    @torch.no_grad()
    def score_from_logits(self, batch: Batch) -> Tensor:
        """Log-probabilities Float[N, T] as `score`, from the model's own forward pass and all its logits."""
        self.engine.eval()
        return self.engine(on_device(batch, self.device), from_logits=True)

    @torch.no_grad()
    def score_reference(self, batch: Batch) -> Tensor:
        """Log-probabilities Float[N, T] under the policy at the run's start: the adapter off, or a frozen copy.

        Raises:
            RuntimeError: The policy was built without a reference.
        """
        batch = on_device(batch, self.device)
        self.engine.eval()
        if self._reference is not None:
            return self._reference(batch, with_entropy=False)[0]
        if not isinstance(self.model, PeftModel):
            raise RuntimeError("this policy holds no reference: build it with `with_reference=True`")
        with self.model.disable_adapter():
            return self.engine(batch, with_entropy=False)[0]

    def forward(self, batch: Batch, *, with_entropy: bool = False, pooled_gradient: bool = False) -> Scores:
        """Score a micro-batch with gradients; `backward` must follow before the next forward.

        Every output that carries a gradient must stand in the loss, on every rank: ZeRO-3 walks through the modules
        once for each such output that the backward pass reaches, and ranks that walk differently wait for each other
        for ever.

        Args:
            batch: The micro-batch.
            with_entropy: Give the entropy too; otherwise it is 0.
            pooled_gradient: Let the pooled states carry a gradient, as the log-probabilities do; the same on all ranks.
        """
        self.engine.train()
        if self._silence is not None:
            self._silence.begin()
        batch = on_device(batch, self.device)
        return Scores(*self.engine(batch, with_entropy=with_entropy, pooled_gradient=pooled_gradient))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a scalar loss that is already divided by the *global* denominator.

        Args:
            loss: This rank's part of the global loss. DeepSpeed averages gradients over ranks, so the sum over ranks
                that the global loss means is restored here by the factor world size.
            last: Whether this is the mini-batch's last micro-batch; `step` may follow then.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.engine.dp_world_size, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, take one optimiser step, advance the schedule; give the gradient's norm before clipping.

        Raises:
            FloatingPointError: The gradient is not finite. No weight has been changed.
        """
        norm = None
        if self.engine.zero_optimization_stage() == 0:  # DeepSpeed neither reports nor checks the norm here
            grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                raise FloatingPointError(f"the gradient's norm is {norm}")
        self.updates_begun += 1
        self.engine.step()
        if not self.engine.was_step_applied():
            self.updates_begun -= 1
            raise FloatingPointError("the gradient is not finite")
        return norm if norm is not None else float(self.engine.get_global_grad_norm())

    def is_finite(self) -> bool:
        """Whether the weights that this rank holds, under ZeRO-3 its part of them, are all finite."""
        held = [weights.detach() for weights in self.model.parameters()]
        held += [weights.ds_tensor for weights in self.model.parameters() if hasattr(weights, "ds_tensor")]
        return all(bool(weights.isfinite().all()) for weights in held)

    def renew_learning_rate(self) -> None:
        """Take the next step's learning rate from the schedule: a checkpoint of a shorter run holds another one."""
        schedule = self.engine.lr_scheduler
        for group, peak, course in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * course(schedule.last_epoch)

    @property
    def learning_rate(self) -> float:
        """Learning rate that the next step uses."""
        return float(self.engine.get_lr()[0])


def build_policy(
    folder: str,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    ds_config: Mapping[str, Any],
    *,
    num_updates: int,
    with_reference: bool,
    device: torch.device,
) -> Policy:
    """Load the model and put it on a DeepSpeed engine; called by all ranks.

    Args:
        folder: What `from_pretrained` takes: a Hugging Face id or a folder. That of a PEFT adapter is merged into its
            base for a full policy; a LoRA policy goes on with that adapter, which `checks.check_model` has found to
            fit.
        model: Precision, adapters, checkpointing.
        optimizer: AdamW and its schedule.
        ds_config: DeepSpeed's configuration with no `auto` left in it.
        num_updates: Optimiser steps of the whole run; the schedule ends there.
        with_reference: Keep a frozen reference policy for a KL term.
        device: This rank's device.
    """
    dtype = getattr(torch, model.dtype)
    base = folder if model.lora is None else base_folder(folder)
    goes_on = base != folder  # with the adapter in the folder, instead of a fresh one
    with _partitioned_loading(ds_config):
        language_model = _load(base, model, dtype)
        # A fresh adapter switched off is the policy at the run's start; otherwise that takes a copy.
        copied = with_reference and (model.lora is None or goes_on)
        frozen = _load(folder, model, dtype) if copied else None
    if model.lora is not None:
        language_model = get_peft_model(language_model, peft_config(model.lora), autocast_adapter_dtype=False)
    if goes_on:
        _fill_adapter(language_model, folder)
    if model.gradient_checkpointing:
        # ZeRO-3 releases weights between forward and recomputation, which only re-entrant checkpointing tolerates; that
        # form needs an input with a gradient, which frozen embeddings do not give.
        language_model.gradient_checkpointing_enable({"use_reentrant": True})
        language_model.enable_input_require_grads()
    silence = Silence(language_model, plain_model(language_model)) if model.dropout == "none" else None
    if silence is None and has_noise(language_model):
        logger.warning("model.dropout keep: every update draws another policy than the one that was sampled and scored")
    module = ScoringModule(language_model, model.logprob_chunk_tokens)
    # What transformers calls `constant` passes over the warm-up.
    schedule = "constant_with_warmup" if optimizer.schedule == "constant" else optimizer.schedule
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config=dict(ds_config),
        lr_scheduler=lambda basic: get_scheduler(
            schedule, basic, num_warmup_steps=optimizer.warmup_steps, num_training_steps=num_updates
        ),
    )
    reference = None if frozen is None else _reference_engine(frozen, model, ds_config, device)
    return Policy(engine, language_model, reference, silence)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The micro-batch with its tensors on a device."""
    moved = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in moved.items()})


def _load(folder: str, model: ModelConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return load_causal_lm(
        folder, dtype=dtype, trust_remote_code=model.trust_remote_code, attn_implementation=model.attn_implementation
    )


def peft_config(lora: LoraConfig) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _fill_adapter(model: PeftModel, folder: str) -> None:
    """Load the factors of a saved adapter into a fresh one of the same shape."""
    found = set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    absent = [name for name in found.missing_keys if "lora_" in name]
    if absent or found.unexpected_keys:
        raise InputError(
            f"`model.path` must be an adapter with the factors of all its modules and nothing else, got "
            f"{folder!r} with {sorted([*absent, *found.unexpected_keys])[0]} out of place"
        )


def _reference_engine(
    frozen: nn.Module, model: ModelConfig, ds_config: Mapping[str, Any], device: torch.device
) -> nn.Module:
    module = ScoringModule(frozen.requires_grad_(False), model.logprob_chunk_tokens).eval()
    if ds_config["zero_optimization"]["stage"] < 3:
        return module.to(device)
    partitioned = {k: v for k, v in ds_config.items() if k not in ("optimizer", "scheduler")}
    engine, *_ = deepspeed.initialize(model=module, config=partitioned)
    return engine


@contextlib.contextmanager
def _partitioned_loading(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Let transformers partition weights while it loads them, under ZeRO-3 only.

    transformers finds the configuration through a weak reference in a global; it is taken back afterwards, so that the
    rollout engine's replica is loaded whole.
    """
    if ds_config["zero_optimization"]["stage"] < 3:
        yield
        return
    alive = HfDeepSpeedConfig(dict(ds_config))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive
