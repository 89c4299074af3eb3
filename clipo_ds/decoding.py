"""What makes decoding with a key-value cache fast for any transformers model.

Layer L2, above `clipo_ds.generation`; imports torch and transformers. Three things, each of which leaves the model's
own code as it is:

- `SlotCache` writes keys and values into preallocated buffers, where a finished rollout gives its row to the last one
  and new prompts join at any time (transformers' cache copies everything at every token);
- `use_decode_attention` lets the query heads that share a key-value head share its memory too, for the one query of a
  decoding step (on a CPU or with a padding mask transformers copies the cache once per query head);
- `PackedLinear` keeps float32 and bfloat16 weights in the layout that oneDNN multiplies with, where there is a CPU
  only.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, get_layer_types_and_kwargs
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)

MIN_GROWTH = 64  # columns that a full buffer grows by at least
ATTENTION_NAME = "clipo_decode"
# Layers of transformers' caches: those whose keys and values a `SlotCache` takes, and those that a `WaveCache` holds.
PLAIN_LAYERS = {"full_attention", "sliding_attention"}
STATE_LAYERS = {"chunked_attention", "conv", "linear_attention", "hybrid", "hybrid_sliding"}


class SlotCache(Cache):
    """Keys and values of the rows being decoded; all rows write their next token into one common column.

    Rows 0 .. num_rows - 1 are alive. A row's prompt and response end at column `length`, and begin at a column of its
    own that the caller masks by. Sliding-window layers keep the whole past; their masks do the windowing.
    """

    can_join = True

    def __init__(self, num_slots: int) -> None:
        super().__init__(layers=[])
        self.num_slots = num_slots
        self.num_rows = 0
        self.length = 0

    @property
    def inner(self) -> Cache:
        """What the model's forward takes."""
        return self

    @staticmethod
    def prefill_cache() -> Cache:
        """A fresh cache for a forward over prompts, whose content `admit` takes."""
        return DynamicCache()

    def admit(self, prefilled: Cache, rows: Tensor, *, dead: int, room: int) -> int:
        """Append rows, each a copy of one prompt of a left-padded prefill, so that they end at the common column.

        Args:
            prefilled: Keys and values of P prompts, [P, heads, width, D] a layer.
            rows: Int[M], the prompt of each new row.
            dead: Leading columns that no row alive uses.
            room: Columns that will be wanted after the prompts, at most.

        Returns:
            By how many columns the rows that were alive have moved (`reserve`).
        """
        if not self.layers:
            self.layers = [SlotLayer(self.num_slots) for _ in prefilled.layers]
        shift = self.reserve(prefilled.layers[0].keys.shape[2], dead=dead, room=room)
        end = self.num_rows + len(rows)
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.put(slice(self.num_rows, end), source.keys[rows], source.values[rows])
        self._resize(end, self.length)
        return shift

    def reserve(self, width: int = 0, *, dead: int, room: int) -> int:
        """Make place for the next column: let go of columns that no row uses, and grow by a part of `room`.

        Args:
            width: Columns that must lie before the next one, at least.
            dead: Leading columns that no row alive uses; all of them where no row is alive.
            room: Columns that will be wanted from here on, at most; at least 1.

        Returns:
            By how many columns everything has moved to the right (negative: to the left).
        """
        used = max(self.length - dead, width)
        if used <= self.length < self.layers[0].capacity and dead <= used:
            return 0
        shift = used - self.length
        capacity = used + min(max(MIN_GROWTH, used // 2), room)
        for layer in self.layers:
            layer.rebuild(shift, capacity)
        self._resize(self.num_rows, used)
        return shift

    def remove(self, kept: list[int]) -> list[int]:
        """Keep some rows; gaps are filled with rows from the end. Returns the old position of each row that is left."""
        size = len(kept)
        movers = [row for row in kept if row >= size]
        gaps = sorted(set(range(size)) - set(kept))
        for layer in self.layers:
            layer.move(movers, gaps)
        order = list(range(size))
        for gap, mover in zip(gaps, movers, strict=True):
            order[gap] = mover
        self._resize(size, self.length)
        return order

    def advance(self) -> None:
        """Note that a forward has written the next column."""
        self._resize(self.num_rows, self.length + 1)

    def _resize(self, num_rows: int, length: int) -> None:
        self.num_rows, self.length = num_rows, length
        for layer in self.layers:
            layer.num_rows, layer.length = num_rows, length


class SlotLayer(DynamicLayer):
    """One layer of a `SlotCache`: buffers [num_slots, heads, capacity, D] with [num_rows, heads, length, D] in use."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.num_rows = 0
        self.length = 0
        self.capacity = 0

    def put(self, rows: slice, keys: Tensor, values: Tensor) -> None:
        """Write keys and values so that they end at column `length`."""
        if not self.is_initialized:
            self.keys, self.values = self._blank(keys), self._blank(values)
            self.is_initialized = True
        columns = slice(self.length - keys.shape[2], self.length)
        self.keys[rows, :, columns] = keys
        self.values[rows, :, columns] = values

    def rebuild(self, shift: int, capacity: int) -> None:
        """Move all columns by `shift` into buffers of another capacity; what falls off on the left is not needed."""
        self.capacity = capacity
        if self.is_initialized:
            self.keys, self.values = self._moved(self.keys, shift), self._moved(self.values, shift)

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy rows to other rows."""
        if source:
            self.keys[target, :, : self.length] = self.keys[source, :, : self.length]
            self.values[target, :, : self.length] = self.values[source, :, : self.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next column of every row; give all keys and values up to it, without a copy."""
        end = self.length + key_states.shape[2]
        self.keys[: self.num_rows, :, self.length : end] = key_states
        self.values[: self.num_rows, :, self.length : end] = value_states
        return self.keys[: self.num_rows, :, :end], self.values[: self.num_rows, :, :end]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def _blank(self, like: Tensor) -> Tensor:
        # Zeros, not empty memory: a masked column still enters the product, as 0 times what lies there.
        return like.new_zeros(self.num_slots, like.shape[1], self.capacity, like.shape[3])

    def _moved(self, old: Tensor, shift: int) -> Tensor:
        new = self._blank(old)
        first = max(0, -shift)
        new[: self.num_rows, :, first + shift : self.length + shift] = old[: self.num_rows, :, first : self.length]
        return new


class WaveCache:
    """The interface of `SlotCache` around transformers' own cache, for layers that keep a state instead of keys and
    values.

    Rows cannot join while others are alive, so rollouts are decoded wave by wave.
    """

    can_join = False

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self.inner = self.prefill_cache()
        self.length = 0

    def prefill_cache(self) -> Cache:
        """As `SlotCache.prefill_cache`."""
        return DynamicCache(config=self._config)

    def admit(self, prefilled: Cache, rows: Tensor, *, dead: int, room: int) -> int:
        """As `SlotCache.admit`; no row may be alive."""
        self.inner, self.length = prefilled, prefilled.get_seq_length()
        prefilled.reorder_cache(rows)
        return 0

    def reserve(self, width: int = 0, *, dead: int, room: int) -> int:
        """Nothing to do: transformers' cache grows by itself."""
        return 0

    def remove(self, kept: list[int]) -> list[int]:
        """As `SlotCache.remove`."""
        self.inner.reorder_cache(torch.tensor(kept, dtype=torch.long))
        return kept

    def advance(self) -> None:
        """As `SlotCache.advance`."""
        self.length += 1


def fits_fast_cache(model: PreTrainedModel) -> bool:
    """Whether a model decodes with one of the caches of this module; transformers' own `generate` is for the others."""
    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters
    if not takes_cache or not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return False
    layer_types = set(get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0])
    # What a model keeps in no layer of a cache it keeps in itself, or in layers of its own kind.
    hidden_state = getattr(model, "_is_stateful", False) and layer_types <= PLAIN_LAYERS
    return layer_types <= PLAIN_LAYERS | STATE_LAYERS and not hidden_state


def new_cache(config: PreTrainedConfig, num_slots: int) -> SlotCache | WaveCache:
    """The fastest cache that a model's layers allow."""
    layer_types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if set(layer_types) <= PLAIN_LAYERS:
        return SlotCache(num_slots)
    return WaveCache(config)


# -- attention ---------------------------------------------------------------------------------------------------------


def use_decode_attention(model: PreTrainedModel) -> None:
    """Switch a model from `sdpa` to the same attention with a faster way for single queries; others stay."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION_NAME, decode_attention)
        AttentionMaskInterface.register(ATTENTION_NAME, decode_mask)
        model.set_attn_implementation(ATTENTION_NAME)


def decode_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for `sdpa`; as an additive one where `decode_attention` multiplies by itself."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or mask.shape[2] != 1 or mask.device.type != "cpu":
        return mask
    return torch.zeros(mask.shape, dtype=torch.float32).masked_fill_(~mask, -torch.inf)


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k' / sqrt(D) + mask) v for one query a row, in the form that transformers' attention functions have.

    Args:
        query: Float[N, heads, 1, D]; longer queries go to transformers' own `sdpa`.
        key: Float[N, key-value heads, L, D], a divisor of the query's heads; never copied.
        value: As `key`.
        attention_mask: Additive Float[N, 1, 1, L] on a CPU, else Bool; None masks nothing.
        scaling: Factor in place of 1 / sqrt(D).

    Returns:
        Float[N, 1, heads, D], and None for the attention weights.
    """
    num_rows, num_heads, num_queries, size = query.shape
    masks_heads = attention_mask is not None and attention_mask.shape[1] != 1  # alike or not: heads go their own way
    if num_queries != 1 or masks_heads or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # The heads that share a key-value head become its queries.
    grouped = query.reshape(num_rows, key.shape[1], -1, size)
    if query.device.type == "cpu":
        factor = size**-0.5 if scaling is None else scaling
        scores = torch.matmul(grouped * factor, key.transpose(-1, -2)).float()
        if attention_mask is not None:
            scores += attention_mask
        mixed = torch.matmul(scores.softmax(-1).to(value.dtype), value)
    else:
        mixed = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(num_rows, 1, num_heads, value.shape[-1]), None


# -- linear layers -----------------------------------------------------------------------------------------------------


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with a copy of its weight in oneDNN's blocked layout; inference only.

    It holds the very parameters of the layer that it replaces, so names, ties and in-place updates stay. `pack` brings
    the copy up to date.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        self.weight, self.bias = plain.weight, plain.bias
        self._packed: Tensor | None = None
        self._packed_version = -1

    def pack(self, num_rows: int) -> None:
        """Repack the weight if it has changed since the last time; `num_rows` is the usual size of the input."""
        if self._packed is None or self._packed_version != self.weight._version:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), num_rows)
            self._packed_version = self.weight._version

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")


def pack_linear_layers(model: nn.Module) -> list[PackedLinear]:
    """Replace the linear layers of a model that lives on the CPU, where oneDNN is there and memory for the copies.

    Returns the new layers; call `PackedLinear.pack` on each before the next forward.
    """
    linear = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and module.weight.device.type == "cpu"
    }
    weights = {id(m.weight): m.weight for m in linear.values()}.values()
    if not weights or not {w.dtype for w in weights} <= _packable_dtypes():
        return []
    size = sum(w.nbytes for w in weights)
    if size > psutil.virtual_memory().available / 2:
        logger.info(
            "too little memory for packed copies of the linear layers (%.1f GB): sampling is slower", size / 1e9
        )
        return []
    packed = {id(m): PackedLinear(m) for m in linear.values()}
    for name, module in linear.items():
        model.set_submodule(name, packed[id(module)])
    return list(packed.values())


def _packable_dtypes() -> set[torch.dtype]:
    """What this processor and this build of torch multiply in oneDNN's layout."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return set()
    return {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
