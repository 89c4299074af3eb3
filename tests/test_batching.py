"""Micro-batches hold every row once, keep the budget and lay tokens out where `types.Batch` says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipo_ds.batching import (
    collate,
    equalise,
    flatten_groups,
    plan_micro_batches,
    sequence_length,
    share_prompts,
    split_mini_batches,
)
from clipo_ds.distributed import Ranks
from clipo_ds.types import Batch, Group, Prompt, Rollout

PAD = 99

lengths_and_budget = st.lists(st.integers(1, 40), max_size=40).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(max(lengths, default=1), 120))
)


def pair(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...], uid: int = 0) -> tuple[Prompt, Rollout]:
    prompt = Prompt(uid=uid, text="", token_ids=prompt_ids, ground_truth="1", source="test")
    return prompt, Rollout(token_ids=response_ids, logprobs=(0.0,) * len(response_ids), text="", truncated=False)


def fewest_micro_batches(lengths: list[int], max_tokens: int) -> int:
    """Oracle: dynamic programming over all cuts of the sorted rows."""
    ordered = sorted(lengths, reverse=True)
    best = [0]
    for end in range(1, len(ordered) + 1):
        starts = [s for s in range(end) if (end - s) * ordered[s] <= max_tokens]
        best.append(1 + min(best[s] for s in starts))
    return best[-1]


@given(lengths_and_budget)
def test_a_plan_holds_every_row_exactly_once(case):
    lengths, budget = case
    plan = plan_micro_batches(lengths, budget)
    assert sorted(row for micro in plan for row in micro) == list(range(len(lengths)))
    assert all(plan)


@given(lengths_and_budget)
def test_a_plan_keeps_the_budget_of_padded_tokens(case):
    lengths, budget = case
    for micro in plan_micro_batches(lengths, budget):
        assert len(micro) * max(lengths[row] for row in micro) <= budget


@given(lengths_and_budget)
def test_a_plan_runs_from_the_longest_row_to_the_shortest(case):
    lengths, budget = case
    order = [row for micro in plan_micro_batches(lengths, budget) for row in micro]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


@given(lengths_and_budget)
def test_no_plan_of_the_sorted_rows_needs_fewer_micro_batches(case):
    lengths, budget = case
    assert len(plan_micro_batches(lengths, budget)) == fewest_micro_batches(lengths, budget)


def test_a_plan_by_hand():
    # sorted: 6 (row 2), 5 (row 0), 2 (row 1), 2 (row 3), 1 (row 4); budget 12: 2 rows of 6, then 6 rows of 2
    assert plan_micro_batches([5, 2, 6, 2, 1], 12) == [[2, 0], [1, 3, 4]]


def test_a_row_longer_than_the_budget_is_refused_by_the_setting_s_name():
    with pytest.raises(ValueError, match=r"`optimizer.max_tokens_per_micro_batch` must be at least .*\(8\), got 7"):
        plan_micro_batches([3, 8], 7)


def test_a_batch_is_right_padded_and_says_where_response_tokens_come_from():
    flat = [pair((1, 2, 3), (4, 5)), pair((6,), (7, 8, 9)), pair((1,), (2,))]
    batch = collate(flat, [[1], [0]], PAD)
    assert batch.input_ids.tolist() == [[6, 7, 8, 9, PAD], [1, 2, 3, 4, 5]]
    assert batch.segments.tolist() == [[0, 1, 1, 1, -1], [0, 0, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    assert batch.sequence.tolist() == [0, 1]
    assert batch.state_columns.tolist() == [[0, 1, 2], [2, 3, 0]]  # the last is masked
    assert batch.response_ids.tolist() == [[7, 8, 9], [4, 5, PAD]]
    assert batch.response_mask.tolist() == [[True, True, True], [True, True, False]]
    assert list(batch.rows) == [1, 0]
    assert not batch.shares_prompts
    assert not batch.is_padding


def test_rollouts_that_share_a_prompt_stand_behind_it_as_if_each_were_alone():
    flat = [pair((1, 2), (3, 4)), pair((1, 2), ()), pair((1, 2), (5, 6, 7)), pair((8,), (9,))]
    batch = collate(flat, [[0, 1, 2], [3]], PAD)
    assert batch.shares_prompts
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, *[PAD] * 5]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 3, 3, 3], [0, 1, *[-1] * 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, *[0] * 5]]
    assert batch.sequence.tolist() == [0, 0, 0, 1]
    # the prompt's last token produces every first token
    assert batch.state_columns.tolist() == [[1, 2, 0], [0, 0, 0], [1, 4, 5], [0, 0, 0]]
    assert batch.response_ids.tolist() == [[3, 4, PAD], [PAD] * 3, [5, 6, 7], [9, PAD, PAD]]


def test_sharing_by_hand():
    # A prompt of 4 tokens, responses of 2. The second response joins 6 tokens: 2*6*2 + 4 - 36 = -8 pairs more than
    # alone, the third joins 8: 0, the fourth 10: 8 pairs, which a worth of 1.9 pairs a token does not pay: 7.6.
    flat = [pair((1, 2, 3, 4), (5, 6))] * 4
    assert share_prompts(flat, range(4), 100, 2.0) == [[0, 1, 2, 3]]
    assert share_prompts(flat, range(4), 100, 1.9) == [[0, 1, 2], [3]]
    assert share_prompts(flat, range(4), 9, 100.0) == [[0, 1], [2, 3]]  # 4 + 3 * 2 tokens are over the budget
    assert share_prompts(flat, [0, 3], 100, 0.0) == [[0], [3]]
    assert share_prompts([flat[0], pair((9,), (5,)), pair((9,), (6,))], range(3), 100, 100.0) == [[0], [1, 2]]


token_lists = st.lists(
    st.tuples(
        st.lists(st.integers(0, 50), min_size=1, max_size=8).map(tuple),
        st.lists(st.lists(st.integers(0, 50), max_size=8).map(tuple), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=8,
)


@given(token_lists, st.sampled_from([0.0, 1.0, 10.0, 1e9]), st.integers(16, 60))
def test_every_rollout_of_a_batch_can_be_read_back(groups, pairs_per_token, budget):
    flat = [pair(prompt, response) for prompt, responses in groups for response in responses]
    sequences = share_prompts(flat, range(len(flat)), budget, pairs_per_token)
    assert [row for sequence in sequences for row in sequence] == list(range(len(flat)))
    assert all(sequence_length(flat, sequence) <= budget for sequence in sequences)
    batch = collate(flat, sequences, PAD)
    assert batch.input_ids.dtype == batch.response_ids.dtype == batch.state_columns.dtype == torch.int64
    assert batch.response_mask.dtype == torch.bool
    assert batch.response_mask.shape[1] == max(1, *[len(rollout.token_ids) for _, rollout in flat], 1)
    for n, row in enumerate(batch.rows):
        prompt, rollout = flat[row]
        assert tuple(batch.response_ids[n][batch.response_mask[n]].tolist()) == rollout.token_ids
        # What a producing column sees up to itself is the prompt and the response before the token it produces.
        sequence = batch.sequence[n]
        ids, segments, positions = (t[sequence] for t in (batch.input_ids, batch.segments, batch.position_ids))
        for step in range(len(rollout.token_ids)):
            column = int(batch.state_columns[n, step])
            seen = (segments[: column + 1] == 0) | (segments[: column + 1] == segments[column])
            assert tuple(ids[: column + 1][seen].tolist()) == prompt.token_ids + rollout.token_ids[:step]
            assert positions[: column + 1][seen].tolist() == list(range(len(prompt.token_ids) + step))
    padding = batch.segments == -1
    assert (batch.input_ids[padding] == PAD).all()


def test_a_response_without_tokens_has_a_mask_that_is_false_throughout():
    batch = collate([pair((1, 2), ())], [[0]], PAD)
    assert batch.input_ids.tolist() == [[1, 2]]
    assert batch.response_ids.tolist() == [[PAD]]
    assert batch.response_mask.tolist() == [[False]]


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"`flat\[1\]` must have a prompt of at least one token, got none"):
        collate([pair((1,), (2,)), pair((), (2,), uid=7)], [[0], [1]], PAD)
    with pytest.raises(ValueError, match="`sequences` must hold at least one rollout"):
        collate([pair((1,), (2,))], [], PAD)


def check_padding(batch: Batch) -> None:
    assert batch.is_padding
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.segments.tolist() == [[0]]
    assert batch.response_mask.tolist() == [[False]]


def test_equalising_appends_padding_after_the_real_micro_batches():
    real = [collate([pair((1, 2), (3,))], [[0]], PAD)]
    equal = equalise(real, 3, PAD)
    assert equal[0] is real[0]
    assert len(equal) == 3
    check_padding(equal[1])
    check_padding(equal[2])


def test_a_rank_without_rows_still_gets_its_micro_batches():
    equal = equalise([], 2, PAD)
    assert len(equal) == 2
    check_padding(equal[0])


def test_equalising_to_fewer_than_there_are_is_refused():
    real = [collate([pair((1,), (2,))], [[0]], PAD)] * 2
    with pytest.raises(ValueError, match=r"`count` must be at least the number of micro-batches \(2\), got 1"):
        equalise(real, 1, PAD)


@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 8), st.integers(0, 30), st.integers(0, 5))
def test_mini_batches_hold_whole_groups_each_once_and_are_even(num_groups, group_size, count, first_group, seed):
    generator = torch.Generator().manual_seed(seed)
    split = split_mini_batches(num_groups, group_size, count, first_group=first_group, generator=generator)
    assert len(split) == count
    assert sorted(row for rows in split for row in rows) == list(range(num_groups * group_size))
    for rows in split:
        groups = {row // group_size for row in rows}
        assert len(rows) == len(groups) * group_size
    sizes = [len(rows) for rows in split]
    assert max(sizes) - min(sizes) in (0, group_size)


@pytest.mark.parametrize(("num_groups", "count"), [(6, 2), (12, 3), (8, 8), (9, 3)])
@pytest.mark.parametrize("world_size", [2, 4, 5, 8])
def test_mini_batches_of_all_ranks_together_do_not_depend_on_their_number(num_groups, count, world_size):
    def split(share: range) -> list[set[int]]:
        generator = torch.Generator().manual_seed(4)
        parts = split_mini_batches(len(share), 2, count, first_group=share.start, generator=generator)
        return [{share.start * 2 + row for row in part} for part in parts]

    shares = [Ranks(rank, world_size, rank, torch.device("cpu")).share(num_groups) for rank in range(world_size)]
    together = [set().union(*parts) for parts in zip(*map(split, shares), strict=True)]
    assert together == split(range(num_groups))
    assert {len(part) for part in together} == {num_groups * 2 // count}


def test_the_generator_draws_the_order_of_the_mini_batches():
    orders = {
        tuple(rows[0] for rows in split_mini_batches(4, 1, 4, generator=torch.Generator().manual_seed(seed)))
        for seed in range(20)
    }
    assert len(orders) > 10


def test_flattened_groups_stay_side_by_side():
    a, b = pair((1,), (2,), uid=0), pair((3,), (4,), uid=1)
    flat = flatten_groups([Group(a[0], (a[1], a[1])), Group(b[0], (b[1],))])
    assert [(prompt.uid, rollout.token_ids) for prompt, rollout in flat] == [(0, (2,)), (0, (2,)), (1, (4,))]
