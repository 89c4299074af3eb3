"""Rollout engines: what samples responses from the policy's weights.

`RolloutEngine` is all that the rest of the package knows of a sampler; `TransformersEngine` is the one that runs
anywhere. Layer L2, imports torch, transformers and the package's `decoding` and `sampling`. An engine holds its own
whole replica of the model on its rank and gets weights through `load_weights` only.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clipo_ds.decoding import fits_fast_cache, new_cache, pack_linear_layers, use_decode_attention
from clipo_ds.library_decoding import decode_with_library
from clipo_ds.models import stop_token_ids
from clipo_ds.sampling import Row, Sampling, draw_next, uniform_stream
from clipo_ds.thoughts import response_decoder
from clipo_ds.turns import completes_stop, spoken_ids, until_stop
from clipo_ds.types import Group, Prompt, Rollout

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 16_384  # prompt tokens, padding included, in one forward


class RolloutEngine(Protocol):
    """A sampler with its own copy of the policy's weights."""

    takes_original_names: bool
    """Whether `load_weights` wants the weights as the model's published folder has them, or as transformers does."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int,
    ) -> list[Group]:
        """Sample `group_size` responses a prompt; rollout k depends on (weights, seed, prompt.uid, k) only."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights, named as `takes_original_names` says; raise when any is left out."""
        ...

    def sleep(self) -> None:
        """Free the accelerator's memory until `wake`."""
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...

    def close(self) -> None:
        """End what the engine started, before the process group ends; it cannot be used afterwards."""
        ...


class ScoringEngine(RolloutEngine, Protocol):
    """A sampler that can work beside the training, and be asked what its weights say about given tokens."""

    def score(self, prompt: Prompt, rollout: Rollout) -> dict[str, list[float]]:
        """Log-probabilities of all of a rollout's tokens but the last, by name of the copies of the weights."""
        ...


@runtime_checkable
class AdapterEngine(RolloutEngine, Protocol):
    """A sampler that holds the base weights of a LoRA policy and takes the adapter alone."""

    def load_adapter(self, folder: Path) -> None:
        """Take a PEFT folder's adapter in place of the last one; the folder may vanish afterwards."""
        ...


class TransformersEngine:
    """Samples with a transformers model: one prefill a prompt, a shared cache, rows that leave and join at any step.

    The reported log-probabilities are those of the tokens drawn, under the full softmax at temperature 1, whatever the
    sampling temperature and filters were. On a CPU the linear weights are held twice where memory allows, once in the
    layout that multiplies fastest.

    Args:
        model: The replica; it is changed for inference (no gradients, faster layers) and must not be shared.
        tokenizer: Decodes responses; names the padding and stop tokens.
        max_sequences: Rollouts decoded at once.
        stop_ids: Tokens that end a response; None takes those that model and tokenizer name.
        stop_texts: Texts that end a response. The tokens up to the one that completes it are kept, the text before it.
        sleep: Let `sleep` free an accelerator's memory.
        thought_tags: `data.thought_tags`; responses keep those of them that are special tokens.
    """

    takes_original_names = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_sequences: int = 256,
        stop_ids: Iterable[int] | None = None,
        stop_texts: Sequence[str] = (),
        sleep: bool = False,
        thought_tags: Sequence[str] | None = None,
    ) -> None:
        if max_sequences < 1:
            raise ValueError(f"`max_sequences` must be at least 1, got {max_sequences}")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._text_of = response_decoder(tokenizer, thought_tags)
        self.max_sequences = max_sequences
        self.stop_ids = stop_token_ids(tokenizer, model.generation_config) if stop_ids is None else frozenset(stop_ids)
        self.stop_texts = tuple(stop_texts)
        self._home = model.device
        self._sleeps = sleep and self._home.type != "cpu"
        self.fits_fast_cache = fits_fast_cache(model)
        if self.fits_fast_cache:
            use_decode_attention(model)
        else:
            logger.info("rollout.engine: sampling with transformers' own generate (slower)")
        self._packed = pack_linear_layers(model)
        # Code that came with a model may not know how to skip the logits of the prompt.
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int,
    ) -> list[Group]:
        """Sample `group_size` responses to each prompt.

        Rollout k of a prompt depends on the weights, `seed`, the prompt's tokens and `uid`, and k: not on the other
        prompts, their order, `max_sequences` or the rank, up to the rounding of the logits.

        Args:
            prompts: With `uid` of at least 0, different where prompts shall be sampled independently.
            group_size: Rollouts a prompt.
            max_new_tokens: Length cap of a response, in tokens; what reaches it without such an end is truncated.
            temperature: 0 decodes greedily.
            top_p: Nucleus threshold in (0, 1]; 1 is off.
            top_k: Number of likeliest tokens to keep; 0 is off.
            seed: At least 0.

        Returns:
            One group a prompt, in the order of the prompts.

        Raises:
            ValueError: An argument is out of its range, or a prompt has no tokens.
            FloatingPointError: The logits are not finite.
        """
        check_arguments(prompts, group_size, max_new_tokens, temperature, top_p, top_k)
        if not prompts:
            return []
        for layer in self._packed:
            layer.pack(min(self.max_sequences, len(prompts) * group_size))
        rows = [
            Row(p, k, uniform_stream(seed, prompt.uid, k))
            for p, prompt in enumerate(prompts)
            for k in range(group_size)
        ]
        completes = functools.partial(completes_stop, self.tokenizer, stop_texts=self.stop_texts)
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, self.stop_ids, completes)
        if self.fits_fast_cache:
            _Decoder(self, prompts, sampling).run(rows)
        else:
            decode_with_library(self.model, prompts, rows, sampling, max_sequences=self.max_sequences)
        rollouts = [
            Rollout(tuple(row.token_ids), tuple(row.logprobs), self._answer_of(row.token_ids), not row.stopped)
            for row in rows
        ]
        return [
            Group(prompt, tuple(rollouts[p * group_size : (p + 1) * group_size])) for p, prompt in enumerate(prompts)
        ]

    def _answer_of(self, token_ids: Sequence[int]) -> str:
        return until_stop(self._text_of(spoken_ids(token_ids, self.stop_ids)), self.stop_texts)[0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a whole set of weights into the replica, in place.

        The iterator is always run to its end, since on the other side of it ranks gather weights together.

        Args:
            weights: Names of the plain Hugging Face model and tensors of any float dtype and device. One name of tied
                weights is enough; a tensor is read before the next one is asked for.

        Raises:
            RuntimeError: A name is unknown, a shape differs, or a parameter was left out; the replica is then a
                mixture of old and new weights.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        covered: set[int] = set()
        wrong: list[str] = []
        with torch.no_grad():
            for name, tensor in weights:
                parameter = parameters.get(name)
                if parameter is None:
                    wrong.append(f"{name} is not a parameter of the sampler's model")
                elif parameter.shape != tensor.shape:
                    wrong.append(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}")
                else:
                    parameter.copy_(tensor)
                    covered.add(id(parameter))
        wrong += [f"{name} was left out" for name, p in parameters.items() if id(p) not in covered]
        raise_wrong_weights(wrong)

    def sleep(self) -> None:
        """Move the replica to the CPU, where the engine was made to; nothing to do where it lives there."""
        if self._sleeps:
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Move the replica back to where it was."""
        self.model.to(self._home)

    def close(self) -> None:
        """Nothing to do."""

    def forward(self, **inputs: object) -> Tensor:
        """Logits Float[N, V] of the last position."""
        return self.model(**inputs, **self._last_only, use_cache=True).logits[:, -1]


class _Decoder:
    """The decoding loop of one `generate` call, and the rows that are alive in it."""

    def __init__(self, engine: TransformersEngine, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self.engine = engine
        self.prompts = prompts
        self.sampling = sampling
        self.device = engine.model.device
        self.alive: list[Row] = []  # in the order of the cache's rows

    def run(self, rows: Sequence[Row]) -> None:
        """Decode all rows to their end."""
        queue = deque(rows)
        num_slots = min(self.engine.max_sequences, len(rows))
        self.cache = new_cache(self.engine.model.config, num_slots)
        while queue or self.alive:
            free = num_slots - len(self.alive)
            # A prefill for every row that leaves would cost more than a few empty places.
            joining = not self.alive or (self.cache.can_join and 4 * free >= num_slots)
            while queue and free and joining:
                self._admit(self._next_rows(queue, free))
                free = num_slots - len(self.alive)
                joining = self.cache.can_join or not self.alive
            if self.alive:
                self._step()

    def _next_rows(self, queue: deque[Row], free: int) -> list[Row]:
        """The next rows whose prompts make one forward of bounded size."""
        rows: list[Row] = []
        prompts: set[int] = set()
        longest = 0
        while queue and len(rows) < free:
            prompt = queue[0].prompt
            prompts.add(prompt)
            longest = max(longest, len(self.prompts[prompt].token_ids))
            if rows and longest * len(prompts) > PREFILL_TOKENS:
                break
            rows.append(queue.popleft())
        return rows

    def _admit(self, rows: list[Row]) -> None:
        """Prefill the rows' prompts, draw the first tokens, and let the rows that go on join the others."""
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
        ids, mask = self._left_padded([self.prompts[prompt].token_ids for prompt in places])
        prefilled = self.cache.prefill_cache()
        logits = self.engine.forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=prefilled,
        )
        draw_next(logits[[places[row.prompt] for row in rows]], rows, self.sampling)
        joining = [row for row in rows if not row.ended(self.sampling)]
        if not joining:
            return
        index = torch.tensor([places[row.prompt] for row in joining], device=self.device)
        shift = self.cache.admit(prefilled, index, dead=self._dead(), room=self.sampling.max_new_tokens)
        self._shift(shift)
        for row in joining:
            row.start = self.cache.length - len(self.prompts[row.prompt].token_ids)
        self.alive += joining

    def _step(self) -> None:
        """Draw the next token of every row that is alive; let those that are at their end leave."""
        room = self.sampling.max_new_tokens + 1 - min(len(row.token_ids) for row in self.alive)
        self._shift(self.cache.reserve(dead=self._dead(), room=room))
        starts = torch.tensor([[row.start] for row in self.alive], device=self.device)  # (N, 1)
        columns = torch.arange(self.cache.length + 1, device=self.device)
        logits = self.engine.forward(
            input_ids=torch.tensor([row.token_ids[-1:] for row in self.alive], device=self.device),
            attention_mask=(columns >= starts).long(),
            position_ids=self.cache.length - starts,
            past_key_values=self.cache.inner,
        )
        self.cache.advance()
        draw_next(logits, self.alive, self.sampling)
        kept = [i for i, row in enumerate(self.alive) if not row.ended(self.sampling)]
        if len(kept) < len(self.alive):
            self.alive = [self.alive[i] for i in self.cache.remove(kept)]

    def _dead(self) -> int:
        """Leading columns of the cache that no row uses."""
        return min((row.start for row in self.alive), default=self.cache.length)

    def _shift(self, shift: int) -> None:
        for row in self.alive if shift else ():
            row.start += shift

    def _left_padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both Int[P, width]; which id pads does not matter, since nothing attends to it."""
        width = max(map(len, sequences))
        ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=self.device)
        mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=self.device)
        return ids, mask


def raise_wrong_weights(wrong: Sequence[str]) -> None:
    """Raise `RuntimeError` with the first few of what was wrong with a set of weights, if anything was."""
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise RuntimeError(f"weight sync failed: {'; '.join(wrong[:3])}{more}")


def check_arguments(
    prompts: Sequence[Prompt], group_size: int, max_new_tokens: int, temperature: float, top_p: float, top_k: int
) -> None:
    """Raise `ValueError` for an argument of `RolloutEngine.generate` that is out of its range."""
    for name, value in (("group_size", group_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if not temperature >= 0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"`top_k` must be at least 0, got {top_k}")
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(f"`prompts` must have tokens, got none in the prompt with uid {prompt.uid}")
