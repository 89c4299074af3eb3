"""The memory-saving ways of computing contrastive losses against one plain N x N form."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipo_ds.contrastive import LEVELS, LOSSES, contrastive_loss
from clipo_ds.contrastive_kernels import LARGEST_BLOCK, TILE_PAIRS


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def dense_losses(z, correct, group, *, loss, level, similarity, temperature):
    """Every pair at once; only for losses that draw nothing."""
    others = ~torch.eye(len(z), dtype=torch.bool)
    same = group[:, None] == group
    positive = others & correct & correct[:, None] & (same if level != "batch" else True)
    others = others & (same if level == "group" else True)
    valid = positive.any(dim=1) & (others & ~positive).any(dim=1)
    similar = z @ z.T if similarity == "cosine" else 1 - (2 - 2 * z @ z.T).clamp(min=1e-8).sqrt()
    logits = similar / temperature
    spread = logits.masked_fill(~others, -torch.inf)[valid].logsumexp(dim=1)
    if loss == "supcon_out":
        pull = (logits * positive)[valid].sum(dim=1) / positive[valid].sum(dim=1)
    else:
        pull = logits.masked_fill(~positive, -torch.inf)[valid].logsumexp(dim=1)
    count = positive[valid].sum(dim=1).double().log() if loss == "supcon_in" else 0.0
    return torch.zeros(len(z), dtype=z.dtype).index_put((valid.nonzero().squeeze(1),), spread - pull + count)


def rollouts(sizes, dim=6, dtype=torch.float64):
    """Groups of the given sizes, their rows shuffled."""
    generator = torch.Generator().manual_seed(sum(sizes))
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    z = torch.randn(len(group), dim, dtype=torch.float64, generator=generator)
    correct = torch.rand(len(group), generator=generator) < 0.5
    return torch.nn.functional.normalize(z, dim=1).to(dtype), correct, group


def compare(sizes, level, loss, similarity, dtype=torch.float64):
    z, correct, group = rollouts(sizes)
    words = {"loss": loss, "level": level, "similarity": similarity, "temperature": 0.1}
    plain, ours = z.clone().requires_grad_(), z.to(dtype).requires_grad_()
    pull = torch.linspace(-1, 1, len(z), dtype=torch.float64)
    want, have = dense_losses(plain, correct, group, **words), contrastive_loss(ours, correct, group, **words)
    (want * pull).sum().backward()
    (have.per_rollout * pull.to(dtype)).sum().backward()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(have.per_rollout.double(), want.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("similarity", ["cosine", "l2"])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "infonce"])
def test_one_giant_group_among_small_ones_equals_the_dense_form(loss, similarity, dtype):
    compare([LARGEST_BLOCK + 60, 1, 2, 3, 3, LARGEST_BLOCK + 1, 16, 16], "group", loss, similarity, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("level", ["batch", "cross"])
def test_several_tiles_of_anchors_equal_the_dense_form(level, dtype):
    sizes = [16] * 190
    num_anchors = int(rollouts(sizes)[1].sum())
    assert num_anchors * sum(sizes) > 2 * TILE_PAIRS
    compare(sizes, level, "supcon_out", "cosine", dtype)


def test_many_blocks_of_groups_equal_the_dense_form():
    compare([5] * 300 + [4] * 300, "group", "soft_nn", "l2")


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_group_level_never_makes_a_tensor_of_all_pairs(similarity, shuffled):
    z, correct, group = rollouts([8] * 128, dim=16, dtype=torch.float32)
    group = group if shuffled else torch.arange(1024) // 8
    z.requires_grad_()
    with LargestTensor() as largest:
        contrastive_loss(z, correct, group, similarity=similarity).mean.backward()
    assert z.grad.abs().sum() > 0
    assert largest.numel == z.numel()  # 1024 x 16; all pairs would be 1024 x 1024


def test_one_giant_group_does_not_pad_the_small_ones():
    z, correct, group = rollouts([LARGEST_BLOCK] + [2] * 1000, dim=4, dtype=torch.float32)
    z.requires_grad_()
    with LargestTensor() as largest:
        contrastive_loss(z, correct, group).mean.backward()
    assert largest.numel == LARGEST_BLOCK**2  # padded to the giant, the 1001 groups would have 1001 times as many


def test_tiles_bound_the_memory_of_the_wider_levels():
    z, correct, group = rollouts([16] * 190, dim=4, dtype=torch.float32)
    z.requires_grad_()
    for level in [level for level in LEVELS if level != "group"]:
        with LargestTensor() as largest:
            contrastive_loss(z, correct, group, level=level).mean.backward()
        assert largest.numel <= TILE_PAIRS < len(z) ** 2


def test_losses_need_no_gradient():
    z, correct, group = rollouts([8] * 4)
    for level in LEVELS:
        with torch.no_grad():
            quiet = contrastive_loss(z, correct, group, level=level)
        assert not quiet.per_rollout.requires_grad
        assert torch.equal(quiet.per_rollout, contrastive_loss(z, correct, group, level=level).per_rollout)
