"""Groups become padded micro-batches: planned by a token budget, collated, and equalised over ranks.

Layer L1: imports torch and `clipo_ds.types` only; knows no ranks (the caller says how many micro-batches all of them
run). The published code splits a batch by a fixed number of rows; here rows are sorted by length and cut by padded
tokens, and the objective divides by global counts, so how rows are cut changes the speed and never the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clipo_ds.types import Batch, Group, Prompt, Rollout


def flatten_groups(groups: Iterable[Group]) -> list[tuple[Prompt, Rollout]]:
    """The N = P * G rollouts of P groups with their prompts, the rollouts of a group side by side."""
    return [(group.prompt, rollout) for group in groups for rollout in group.rollouts]


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut rows into micro-batches whose padded size, rows times longest row, stays within a token budget.

    Rows are sorted by length, longest first (equal lengths keep their order), and each micro-batch takes as many as
    fit. No other plan needs fewer micro-batches, padding is small because neighbours are of like length, and the
    longest rows come first: a budget that is too large for the memory fails at once, not at the end of the pass.

    Args:
        lengths: Tokens of prompt and response together, [N], each at least 1.
        max_tokens: The budget in padded tokens, `optimizer.max_tokens_per_micro_batch`.

    Returns:
        Positions in `lengths`, every one exactly once. Nothing for no rows.

    Raises:
        ValueError: A single row is longer than the budget.

    >>> plan_micro_batches([3, 9, 4, 2], max_tokens=10)
    [[1], [2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if order and lengths[order[0]] > max_tokens:
        raise ValueError(
            f"`optimizer.max_tokens_per_micro_batch` must be at least the tokens of the longest row "
            f"({lengths[order[0]]}), got {max_tokens}"
        )
    plan: list[list[int]] = []
    start = 0
    while start < len(order):
        fitting = max_tokens // max(1, lengths[order[start]])
        plan.append(order[start : start + fitting])
        start += fitting
    return plan


def share_prompts(
    flat: Sequence[tuple[Prompt, Rollout]], rows: Sequence[int], max_tokens: int, pairs_per_token: float
) -> list[list[int]]:
    """Bring rollouts of one prompt together behind a single copy of it, where that is less work than a copy each.

    A prompt of p tokens that G rollouts carry through the network costs G * p tokens; shared, it costs p. What is paid
    for it is attention between responses that the mask throws away afterwards: a response of r tokens that joins a
    sequence of s tokens adds 2 * s * r + r^2 pairs of query and key, against (p + r)^2 alone. It joins while the
    surplus is at most ``pairs_per_token * p``: short responses to long prompts all share, long ones stay alone.

    Args:
        flat: A rank's rollouts with their prompts.
        rows: Positions in `flat`; those of one prompt side by side.
        max_tokens: Most tokens in one sequence, `optimizer.max_tokens_per_micro_batch`.
        pairs_per_token: Pairs of query and key that cost as much as the rest of the network for one token; 0 shares
            nothing.

    Returns:
        The rows of each sequence, every row exactly once, in the order of `rows`.
    """
    sequences: list[list[int]] = []
    length = 0
    for row in rows:
        prompt, rollout = flat[row]
        p, r = len(prompt.token_ids), len(rollout.token_ids)
        surplus = 2 * length * r + r * r - (p + r) ** 2
        if (
            sequences
            and length + r <= max_tokens
            and surplus <= pairs_per_token * p
            and flat[sequences[-1][0]][0].token_ids == prompt.token_ids
            and pairs_per_token > 0
        ):
            sequences[-1].append(row)
            length += r
        else:
            sequences.append([row])
            length = p + r
    return sequences


def sequence_length(flat: Sequence[tuple[Prompt, Rollout]], rows: Sequence[int]) -> int:
    """Tokens of one prompt and the responses of all the given rollouts of it."""
    return len(flat[rows[0]][0].token_ids) + sum(len(flat[row][1].token_ids) for row in rows)


def collate(
    flat: Sequence[tuple[Prompt, Rollout]],
    sequences: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    is_padding: bool = False,
) -> Batch:
    """Lay rollouts out as one right-padded micro-batch on the CPU.

    Args:
        flat: A rank's rollouts with their prompts.
        sequences: Positions in `flat`, those of one sequence together and of one prompt; at least one sequence, none
            of them empty. The N rollouts of the batch are in this order.
        pad_token_id: Fills the columns after a sequence's last token; any id that the model can embed.
        is_padding: Mark the batch as zero-weight; its response mask is False throughout.

    Returns:
        `Batch` with S = the longest sequence and T = the longest response, but at least 1. A response without tokens
        has a mask that is False throughout.

    Raises:
        ValueError: There are no rows, or a prompt has no tokens (nothing would produce its first response token).
    """
    rows = [row for sequence in sequences for row in sequence]
    if not rows:
        raise ValueError("`sequences` must hold at least one rollout, got none")
    ids: list[list[int]] = []
    segments: list[list[int]] = []
    positions: list[list[int]] = []
    producers: list[Tensor] = []
    num_response = torch.tensor([len(flat[row][1].token_ids) for row in rows])
    width = max(1, int(num_response.max()))
    for sequence in sequences:
        prompt = flat[sequence[0]][0]
        p = len(prompt.token_ids)
        if not p:
            raise ValueError(
                f"`flat[{sequence[0]}]` must have a prompt of at least one token, got none (prompt {prompt.uid})"
            )
        ids.append(list(prompt.token_ids))
        segments.append([0] * p)
        positions.append(list(range(p)))
        for number, row in enumerate(sequence, start=1):
            # The prompt's last token produces the first token of every response, each of them the one after itself.
            producers.append(torch.arange(width) + len(ids[-1]) - 1)
            producers[-1][0] = p - 1
            r = len(flat[row][1].token_ids)
            ids[-1] += flat[row][1].token_ids
            segments[-1] += [number] * r
            positions[-1] += range(p, p + r)
    lengths = torch.tensor([len(s) for s in ids])
    response_mask = _leading(num_response, width)
    response_ids = torch.full(response_mask.shape, pad_token_id)
    response_ids[response_mask] = torch.tensor([t for row in rows for t in flat[row][1].token_ids], dtype=torch.long)
    state_columns = torch.stack(producers).where(response_mask, 0)
    return Batch(
        input_ids=_right_padded(ids, lengths, pad_token_id),
        segments=_right_padded(segments, lengths, -1),
        position_ids=_right_padded(positions, lengths, 0),
        sequence=torch.repeat_interleave(torch.tensor([len(s) for s in sequences])),
        state_columns=state_columns,
        response_ids=response_ids,
        response_mask=response_mask & (not is_padding),
        rows=tuple(rows),
        shares_prompts=any(len(sequence) > 1 for sequence in sequences),
        is_padding=is_padding,
    )


def equalise(batches: Sequence[Batch], count: int, pad_token_id: int) -> list[Batch]:
    """Append padding micro-batches until there are `count`, so that every rank makes the same forwards and backwards.

    Under ZeRO-3 each pass is a collective: a rank with fewer of them would leave the others waiting for ever. A padding
    micro-batch is a single prompt token without a response, the cheapest pass there is, and needs no rollout of the
    rank's own; its response mask is False throughout and its `rows` are (0,), which `is_padding` forbids to read.

    Raises:
        ValueError: There are more than `count` already.
    """
    if len(batches) > count:
        raise ValueError(f"`count` must be at least the number of micro-batches ({len(batches)}), got {count}")
    nothing = (Prompt(0, "", (pad_token_id,), "", ""), Rollout((), (), "", False))
    padding = collate([nothing], [[0]], pad_token_id, is_padding=True)
    return [*batches, *[padding] * (count - len(batches))]


def split_mini_batches(
    num_groups: int, group_size: int, count: int, *, first_group: int = 0, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Split a rank's rollouts into its parts of the global mini-batches of one pass: whole groups.

    Mini-batch m takes every `count`-th group of the *global* batch from the m-th on, and the generator draws the order
    in which the mini-batches come: neither depends on the number of ranks. Globally their sizes are within one group of
    each other. (The groups themselves are in shuffled order already.)

    Args:
        num_groups: Groups on this rank, side by side in the flat list of rollouts.
        group_size: Rollouts a group.
        count: Mini-batches, `optimizer.mini_batches`. Some may hold no group of this rank: it still takes part.
        first_group: Position of this rank's first group in the global batch.
        generator: Draws the order, seeded alike on every rank; None keeps the order 0, 1, ….

    Returns:
        `count` lists of positions in the flat list of rollouts, every position exactly once.

    Raises:
        ValueError: `count` is below 1.

    >>> split_mini_batches(num_groups=3, group_size=2, count=2)
    [[0, 1, 4, 5], [2, 3]]
    >>> split_mini_batches(num_groups=3, group_size=2, count=2, first_group=3)
    [[2, 3], [0, 1, 4, 5]]
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    order = range(count) if generator is None else torch.randperm(count, generator=generator).tolist()
    return [
        [
            group * group_size + k
            for group in range((place - first_group) % count, num_groups, count)
            for k in range(group_size)
        ]
        for place in order
    ]


def _right_padded(rows: Sequence[Sequence[int]], lengths: Tensor, fill: int) -> Tensor:
    """Int[R, S] of rows of the given lengths, S the longest."""
    mask = _leading(lengths, int(lengths.max()))
    padded = torch.full(mask.shape, fill)
    # Masked assignment fills row by row, so one flat list lays out the whole batch.
    padded[mask] = torch.tensor([value for row in rows for value in row])
    return padded


def _leading(counts: Tensor, width: int) -> Tensor:
    """Bool[N, width], True in the first ``counts[n]`` columns of row n."""
    return torch.arange(width)[None, :] < counts[:, None]
