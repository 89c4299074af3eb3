"""The parts that make decoding fast, against the plain ones that they stand in for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from clipo_ds.decoding import SlotCache, decode_attention, pack_linear_layers, use_decode_attention


def prefilled(*rows: float, width: int) -> DynamicCache:
    """A cache of two layers; the keys of prompt p are rows[p] + its columns / 100, values their negatives."""
    cache = DynamicCache()
    keys = torch.tensor(rows)[:, None, None, None] + torch.arange(width)[:, None] / 100
    for layer in range(2):
        cache.update(keys + 1000 * layer, -keys - 1000 * layer, layer)
    return cache


def write(cache: SlotCache, *values: float) -> torch.Tensor:
    """One decoding step's update; gives the keys of the first layer, [rows, columns]."""
    new = torch.tensor(values)[:, None, None, None]
    first, _ = cache.update(new, -new, 0)
    keys, other = cache.update(new + 1000, -new - 1000, 1)
    assert torch.equal(keys[:, :, -1:], new + 1000) and torch.equal(other, -keys)
    cache.advance()
    return first[:, 0, :, 0]


def test_rows_leave_and_join_without_disturbing_each_other() -> None:
    cache = SlotCache(num_slots=3)
    assert cache.admit(prefilled(10.0, 20.0, width=2), torch.tensor([0, 1, 1]), dead=0, room=3) == 2
    assert write(cache, 1, 2, 3).tolist() == [
        pytest.approx(r) for r in ([10, 10.01, 1], [20, 20.01, 2], [20, 20.01, 3])
    ]
    assert cache.remove([1, 2]) == [2, 1]  # the last row fills the gap of the first
    assert write(cache, 4, 5).tolist() == [pytest.approx(r) for r in ([20, 20.01, 3, 4], [20, 20.01, 2, 5])]
    # A prompt of three tokens joins: it ends at the common column 4, so its row begins at column 1.
    assert cache.admit(prefilled(30.0, width=3), torch.tensor([0]), dead=0, room=3) == 0
    assert cache.reserve(dead=0, room=3) == 0
    assert write(cache, 6, 7, 8)[2, 1:].tolist() == pytest.approx([30, 30.01, 30.02, 8])


def test_a_longer_prompt_moves_the_rows_that_are_alive_to_the_right() -> None:
    cache = SlotCache(num_slots=2)
    cache.admit(prefilled(10.0, width=2), torch.tensor([0]), dead=0, room=9)
    assert cache.admit(prefilled(20.0, width=5), torch.tensor([0]), dead=0, room=9) == 3
    keys = write(cache, 1, 2)
    assert keys[0, 3:].tolist() == pytest.approx([10, 10.01, 1])
    assert keys[1].tolist() == pytest.approx([20, 20.01, 20.02, 20.03, 20.04, 2])


def test_columns_that_no_row_uses_are_let_go_and_buffers_grow_as_needed() -> None:
    cache = SlotCache(num_slots=1)
    cache.admit(prefilled(10.0, width=2), torch.tensor([0]), dead=0, room=200)
    for step in range(150):
        assert cache.reserve(dead=0, room=200 - step) == 0
        keys = write(cache, step)
    assert keys[0, 2:].tolist() == list(range(150))
    assert 152 <= cache.layers[0].capacity < 202
    # Another row has joined lately and the old one has left: the 140 columns before it go.
    assert cache.reserve(dead=140, room=10) == -140
    assert write(cache, -1)[0].tolist() == [*range(138, 150), -1]


def test_stale_memory_never_reaches_a_masked_product() -> None:
    # 0 times NaN is NaN: columns that are only masked must hold numbers.
    cache = SlotCache(num_slots=2)
    cache.admit(prefilled(10.0, width=1), torch.tensor([0]), dead=0, room=9)
    cache.admit(prefilled(20.0, width=4), torch.tensor([0]), dead=0, room=9)
    assert torch.isfinite(write(cache, 1, 2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_queries_attend_like_sdpa_with_repeated_heads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    visible = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)[:, None, None]
    expected = nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), attn_mask=visible, scale=0.2
    )
    additive = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    mixed, _ = decode_attention(nn.Module(), query.to(dtype), key.to(dtype), value.to(dtype), additive, scaling=0.2)
    assert mixed.shape == (3, 1, 6, 8) and mixed.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    assert torch.allclose(mixed.float(), expected.transpose(1, 2), atol=tolerance, rtol=0)


def small_llama(implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_a_model_gives_the_same_logits_with_the_faster_parts() -> None:
    plain, fast = small_llama("sdpa"), small_llama("sdpa")
    use_decode_attention(fast)
    layers = pack_linear_layers(fast)
    for layer in layers:
        layer.pack(2)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        for model_ids, model_mask in ((ids, mask), (ids[:, :1], mask[:, -1:])):
            expected = plain(model_ids, attention_mask=model_mask).logits
            assert torch.allclose(fast(model_ids, attention_mask=model_mask).logits, expected, atol=1e-5)


def test_another_attention_than_sdpa_is_left_alone() -> None:
    model = small_llama("eager")
    use_decode_attention(model)
    assert model.config._attn_implementation == "eager"


def test_packed_layers_keep_names_ties_and_parameters() -> None:
    model = small_llama("sdpa")
    before = dict(model.named_parameters(remove_duplicate=False))
    layers = pack_linear_layers(model)
    assert len(layers) == 2 * 7 + 1
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(before) == list(after) and all(after[name] is before[name] for name in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_packed_layer_follows_its_weight_and_takes_any_number_of_rows() -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(40, 24))
    (layer,) = pack_linear_layers(holder)
    with torch.no_grad():
        for change in (0.0, 1.0):
            layer.weight.add_(change)
            layer.pack(32)
            for shape in ((1, 40), (32, 40), (3, 7, 40)):
                rows = torch.randn(shape)
                expected = nn.functional.linear(rows, layer.weight, layer.bias)
                assert torch.allclose(layer(rows), expected, atol=1e-4)


def test_layers_that_are_no_plain_float_linear_layers_stay() -> None:
    class Own(nn.Linear):
        pass

    holder = nn.Sequential(Own(4, 4), nn.Embedding(4, 4))
    assert pack_linear_layers(holder) == [] and type(holder[0]) is Own
    assert pack_linear_layers(nn.Sequential(nn.Linear(4, 4).double())) == []
