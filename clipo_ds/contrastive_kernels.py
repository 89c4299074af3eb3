"""How contrastive losses are computed in little memory: group by group, or in tiles of anchors against all rows.

`clipo_ds.contrastive` has the equations and the public functions; what is here takes checked arguments. Imports torch
and `clipo_ds.grouping`.

Two things are done against the grain of float32. Dot products of the l2 similarity are summed in float64, because
2 - 2 z·z' cancels for near embeddings; and the rounding of |z|² - 1 is taken out of it (1e-7 or so), so that equal
embeddings have distance 0, not √1e-7, whose slope would be far too steep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipo_ds.grouping import Groups, group_sum, rows_by_group_size

BLOCK_ROWS = 1024  # rows whose group blocks are multiplied at once
LARGEST_BLOCK = 256  # a group of more rows is gone through in tiles
TILE_PAIRS = 2**21  # similarities held at once in a tile: 8 MB in float32
MIN_SQUARED_DISTANCE = 1e-8
UNIT_ROUNDING = 64  # a squared length within this many machine epsilons of 1 is 1 and rounding


@dataclass(frozen=True)
class Form:
    """Which contrastive loss; the words are those of `clipo_ds.contrastive.contrastive_loss`."""

    loss: str
    similarity: str
    denominator: str
    temperature: float


@dataclass(frozen=True)
class Anchors:
    """What is known of the N rows besides their embeddings."""

    correct: Bool[Tensor, " N"]
    valid: Bool[Tensor, " N"]  # rows that are anchors, from `valid_anchors`
    draw: Float[Tensor, " N"]  # in [0, 1): chooses infonce's positive

    def of(self, rows: Int[Tensor, " M"]) -> Anchors:
        """The same of some rows only."""
        return Anchors(self.correct[rows], self.valid[rows], self.draw[rows])


def valid_anchors(correct: Bool[Tensor, " N"], groups: Groups, level: str) -> Bool[Tensor, " N"]:
    """Correct rows with a positive and with a non-positive among the others."""
    num_rows, num_correct = len(correct), correct.sum()
    in_group = group_sum(correct.long(), groups)
    if level == "group":
        return correct & ((in_group >= 2) & (in_group < groups.size))[groups.index]
    if level == "cross":
        return correct & ((in_group >= 2) & (in_group < num_rows))[groups.index]
    return correct & (num_correct >= 2) & (num_correct < num_rows)


def group_losses(embeddings: Float[Tensor, "N D"], anchors: Anchors, groups: Groups, form: Form) -> Float[Tensor, " N"]:
    """Losses at group level, 0 where not valid: one batched product for each group size, no N x N matrix."""
    buckets = rows_by_group_size(groups)
    small = [rows for rows in buckets if rows.shape[1] <= LARGEST_BLOCK]
    rounding = _rounding(embeddings, form)
    done, losses = [], []
    for rows, gram in zip(small, _GroupGram.apply(embeddings, form.similarity == "l2", *small), strict=True):
        place = anchors.valid[rows].flatten().nonzero().squeeze(1)
        anchor, others = rows.flatten()[place], rows[place // rows.shape[1]]  # (A,), (A, G)
        positive = anchors.correct[others]
        done.append(anchor)
        losses.append(_losses(gram.flatten(0, 1)[place], anchor, others, positive, anchors.draw, rounding, form))
    for bucket in buckets[len(small) :]:  # the sizes rise
        for rows in bucket:
            done.append(rows)
            losses.append(tiled_losses(embeddings[rows], anchors.of(rows), torch.zeros_like(rows), form))
    return _at_rows(embeddings, done, losses)


def tiled_losses(
    embeddings: Float[Tensor, "N D"], anchors: Anchors, label: Int[Tensor, " N"], form: Form
) -> Float[Tensor, " N"]:
    """Losses of anchors against all rows, 0 where not valid; positives are the correct rows of the anchor's label.

    Only valid anchors cost anything. A tile's similarities are not kept for the backward pass but computed again.
    """
    place = anchors.valid.nonzero().squeeze(1)
    tile = partial(_tile_losses, anchors=anchors, label=label, rounding=_rounding(embeddings, form), form=form)
    size = max(1, TILE_PAIRS // max(1, len(label)))
    losses = [
        checkpoint(tile, part, embeddings, anchor, use_reentrant=False, preserve_rng_state=False)
        for part, anchor in zip(embeddings[place].split(size), place.split(size), strict=True)
        if len(anchor) > 0
    ]
    return _at_rows(embeddings, [place], losses)


def _tile_losses(
    anchor_embeddings: Float[Tensor, "A D"],
    embeddings: Float[Tensor, "N D"],
    anchor: Int[Tensor, " A"],
    *,
    anchors: Anchors,
    label: Int[Tensor, " N"],
    rounding: Float[Tensor, " N"],
    form: Form,
) -> Float[Tensor, " A"]:
    dtype = torch.float64 if form.similarity == "l2" else embeddings.dtype
    gram = anchor_embeddings.to(dtype) @ embeddings.to(dtype).T  # (A, N)
    positive = anchors.correct & (label[anchor][:, None] == label)
    everyone = torch.arange(len(label), device=label.device)
    return _losses(gram, anchor, everyone, positive, anchors.draw, rounding, form)


def _losses(
    gram: Float[Tensor, "A M"],
    anchor: Int[Tensor, " A"],
    others: Int[Tensor, "*A M"],
    positive: Bool[Tensor, "A M"],
    draw: Float[Tensor, " N"],
    rounding: Float[Tensor, " N"],
    form: Form,
) -> Float[Tensor, " A"]:
    """The four losses of valid anchors, from their dot products with the rows `others`, themselves among them."""
    logits = _logits(gram, anchor, others, rounding, form)
    apart = others != anchor[:, None]
    positive = positive & apart
    spread = _masked_logsumexp(logits, apart & ~positive if form.denominator == "negatives" else apart)
    count = positive.sum(dim=1)
    if form.loss == "infonce":
        rank = (draw[anchor] * count).long().clamp(max=count - 1)
        chosen = (positive.cumsum(dim=1) <= rank[:, None]).sum(dim=1)
        return spread - logits.gather(1, chosen[:, None]).squeeze(1)
    if form.loss == "supcon_out":
        return spread - torch.where(positive, logits, 0.0).sum(dim=1) / count
    pull = _masked_logsumexp(logits, positive)
    if form.loss == "supcon_in":  # a mean of exponentials, where soft_nn has their sum
        pull = pull - count.to(logits.dtype).log()
    return spread - pull


def _masked_logsumexp(values: Float[Tensor, "A M"], mask: Bool[Tensor, "A M"]) -> Float[Tensor, " A"]:
    """Each line of the mask has at least one True."""
    return values.masked_fill(~mask, float("-inf")).logsumexp(dim=1)


def _logits(gram: Tensor, anchor: Tensor, others: Tensor, rounding: Tensor, form: Form) -> Float[Tensor, "A M"]:
    """Dot products to similarities over temperature."""
    if form.similarity == "cosine":
        return gram / form.temperature
    squared = 2 - 2 * gram + rounding[anchor][:, None] + rounding[others]
    return (1 - squared.clamp(min=MIN_SQUARED_DISTANCE).sqrt()) / form.temperature


def _rounding(embeddings: Float[Tensor, "N D"], form: Form) -> Float[Tensor, " N"]:
    """|z|² - 1 where it is no more than rounding, 0 where the length is meant; l2 only, without a gradient."""
    if form.similarity != "l2":
        return embeddings.new_zeros(len(embeddings))
    rows = embeddings.detach().split(BLOCK_ROWS)
    excess = torch.cat([(part.double() ** 2).sum(dim=1) for part in rows]) - 1
    return torch.where(excess.abs() < UNIT_ROUNDING * torch.finfo(embeddings.dtype).eps, excess, 0.0)


def _at_rows(embeddings: Tensor, rows: list[Tensor], losses: list[Tensor]) -> Float[Tensor, " N"]:
    """Losses at their rows, 0 elsewhere; part of the embeddings' graph even where there are no losses."""
    if not losses:
        return embeddings[:, :0].sum(dim=1)
    every = torch.cat(losses).to(embeddings.dtype)
    return every.new_zeros(len(embeddings)).index_copy(0, torch.cat(rows), every)


def _blocks(
    embeddings: Tensor, rows: Int[Tensor, "B G"], dtype: torch.dtype
) -> Iterator[tuple[slice, slice | Tensor, Tensor]]:
    """Groups a few at a time: which lines of `rows`, which rows, and their embeddings Float[b, G, D] in `dtype`.

    Embeddings of equal, contiguous groups are a view of them all. Where rows must be gathered or converted, that is
    done for BLOCK_ROWS at a time.
    """
    num_groups, size = rows.shape
    in_order = torch.equal(rows.flatten(), torch.arange(len(embeddings), device=rows.device))
    whole = in_order and dtype == embeddings.dtype
    step = num_groups if whole else max(1, BLOCK_ROWS // size)
    for start in range(0, num_groups, step):
        lines = slice(start, min(start + step, num_groups))
        chosen = slice(start * size, lines.stop * size) if in_order else rows[lines].flatten()
        yield lines, chosen, embeddings[chosen].reshape(-1, size, embeddings.shape[1]).to(dtype)


class _GroupGram(torch.autograd.Function):
    """Dot products within groups, Float[B, G, G] for each matrix of row numbers.

    Autograd's own backward of z zᵀ holds two gradients of z's size and their sum, for every group size; this one fills
    a single gradient, since a row belongs to one group.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, wide: bool, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(embeddings, *rows)
        dtype = torch.float64 if wide else embeddings.dtype
        grams = tuple(embeddings.new_empty((*part.shape, part.shape[1]), dtype=dtype) for part in rows)
        for part, gram in zip(rows, grams, strict=True):
            for lines, _, block in _blocks(embeddings, part, dtype):
                torch.bmm(block, block.transpose(1, 2), out=gram[lines])
        return grams

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, *rows = ctx.saved_tensors
        total = embeddings.new_empty(embeddings.shape)
        if sum(part.numel() for part in rows) < len(embeddings):
            total.zero_()  # rows of large groups get their gradient elsewhere
        for part, gradient in zip(rows, gradients, strict=True):
            pull = gradient + gradient.transpose(1, 2)
            for lines, chosen, block in _blocks(embeddings, part, gradient.dtype):
                if block.dtype == total.dtype and isinstance(chosen, slice):
                    torch.bmm(pull[lines], block, out=total[chosen].view(block.shape))
                else:
                    total[chosen] = torch.bmm(pull[lines], block).flatten(0, 1).to(total.dtype)
        return total, None, *(None for _ in rows)
