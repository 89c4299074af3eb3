"""The head and its reward: equal on any number of ranks, and unmoved by the update that the reward caused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import save_file

from clipo_ds.contrastive_term import ContrastiveTerm
from clipo_ds.distributed import Ranks
from clipo_ds.schema import ContrastiveConfig
from clipo_ds.types import InputError

HIDDEN, GROUP_SIZE, NUM_GROUPS = 12, 4, 6
CPU = torch.device("cpu")

CASES = {
    "published": ContrastiveConfig(head_output_size=8),
    "drawn positives over the batch": ContrastiveConfig(head_output_size=8, level="batch"),
    "cross": ContrastiveConfig(head_output_size=8, level="cross", loss="supcon_in", policy_loss_weight=0.5),
    "whole batch, embedding path": ContrastiveConfig(
        head_output_size=8, level="batch", loss="soft_nn", policy_loss_weight=1.0, head="mlp"
    ),
    "debiased, centred, no head": ContrastiveConfig(
        loss="soft_nn", denominator="negatives", debias="group_mean", head="none", reward_centering="group"
    ),
    "placebo": ContrastiveConfig(head_output_size=8, loss="supcon_out", shuffle=True),
}
# The groups that dynamic sampling kept; of two ranks the second has the last three.
KEPT = {"all groups": range(NUM_GROUPS), "none of the second rank": (1, 2), "none at all": ()}


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups 0 and 4 are all right, group 3 is all wrong, group 2 has one right answer, 1 and 5 are mixed."""
    generator = torch.Generator().manual_seed(3)
    pooled = torch.randn(NUM_GROUPS * GROUP_SIZE, HIDDEN, generator=generator)
    group = torch.arange(NUM_GROUPS).repeat_interleave(GROUP_SIZE)
    correct = torch.tensor([4, 2, 1, 0, 4, 3])[group] > torch.arange(len(group)) % GROUP_SIZE
    return pooled, correct, group


def rows_of(groups) -> torch.Tensor:
    """Bool[N]: the rows of the named groups."""
    return torch.isin(data()[2], torch.tensor(list(groups), dtype=torch.long))


def outcomes_on(ranks: Ranks, folder: str) -> None:
    """Two steps of every case's term on this rank's share of the groups, with all and with some of them kept; what they
    gave goes into files."""
    pooled, correct, group = data()
    share = ranks.share(NUM_GROUPS)
    rows = slice(share.start * GROUP_SIZE, share.stop * GROUP_SIZE)
    for (case, config), (groups, kept) in product(CASES.items(), KEPT.items()):
        term = ContrastiveTerm(config, HIDDEN, seed=5, ranks=ranks)
        seen = {}
        for step in (1, 2):
            own = (pooled[rows], correct[rows], group[rows], rows_of(kept)[rows], step)
            outcome = term.judge(*own)
            gradient = outcome.pooled_gradient
            seen[f"loss_{step}"], seen[f"reward_{step}"] = outcome.loss, outcome.reward
            seen[f"gradient_{step}"] = torch.zeros(len(outcome.loss)) if gradient is None else gradient
            seen[f"head_mean_{step}"] = torch.tensor([outcome.mean_loss, outcome.num_valid])
            term.learn(*own, outcome.num_valid)
        seen |= {f"head_{name}": weight for name, weight in term.head.state_dict().items()}
        torch.save(seen, f"{folder}/{case}_{groups}_{ranks.world_size}_{ranks.rank}.pt")


@pytest.fixture(scope="module")
def seen_by_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("term")
    for world_size in (1, 2):
        on_ranks(world_size, outcomes_on, str(folder))
    return folder


@pytest.mark.parametrize("groups", KEPT)
@pytest.mark.parametrize("case", CASES)
def test_one_and_two_ranks_give_the_same_rewards_and_the_same_head(seen_by_ranks, case, groups):
    one = torch.load(seen_by_ranks / f"{case}_{groups}_1_0.pt")
    two = [torch.load(seen_by_ranks / f"{case}_{groups}_2_{rank}.pt") for rank in (0, 1)]
    for name, value in one.items():
        if name.startswith("head_"):
            assert torch.equal(two[0][name], two[1][name]), name
            torch.testing.assert_close(two[0][name], value, rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(torch.cat([part[name] for part in two]), value, rtol=1e-4, atol=1e-6)
    assert bool(one["reward_1"].any()) == (groups != "none at all")


@pytest.mark.parametrize("case", CASES)
def test_dropped_groups_are_neither_anchors_nor_candidates(ranks, case):
    pooled, correct, group = data()
    kept = rows_of((1, 2, 5))
    whole, alone = (ContrastiveTerm(CASES[case], HIDDEN, 5, ranks) for _ in range(2))
    seen = whole.judge(pooled, correct, group, kept, 1)
    want = alone.judge(pooled[kept], correct[kept], group[kept], kept[kept], 1)
    assert seen.num_valid == want.num_valid > 0
    for name in ("loss", "valid", "reward"):
        torch.testing.assert_close(getattr(seen, name)[kept], getattr(want, name))
        assert not getattr(seen, name)[~kept].any()
    if seen.pooled_gradient is not None:
        torch.testing.assert_close(seen.pooled_gradient[kept], want.pooled_gradient)
        assert not seen.pooled_gradient[~kept].any()
    assert len(seen.embeddings) == len(pooled)
    norm = whole.learn(pooled, correct, group, kept, 1, seen.num_valid)
    assert norm == pytest.approx(alone.learn(pooled[kept], correct[kept], group[kept], kept[kept], 1, want.num_valid))


def test_reward_is_that_of_the_head_before_its_step(ranks):
    rows = (*data(), rows_of(range(NUM_GROUPS)))
    term = ContrastiveTerm(ContrastiveConfig(loss="supcon_out", head_output_size=8), HIDDEN, 0, ranks)
    first = term.judge(*rows, 1)
    assert term.learn(*rows, 1, first.num_valid) > 0
    second = term.judge(*rows, 1)
    assert second.mean_loss < first.mean_loss  # the head has learnt; the rewards of the first call are as they were
    torch.testing.assert_close(first.reward[first.valid], (-0.2 * first.loss[first.valid]).clamp(min=-0.5))


def test_nothing_is_learnt_without_a_valid_anchor(ranks):
    pooled, _, group = data()
    kept = rows_of(range(NUM_GROUPS))
    term = ContrastiveTerm(ContrastiveConfig(head_output_size=8), HIDDEN, 0, ranks)
    before = {name: value.clone() for name, value in term.head.state_dict().items()}
    for correct in (torch.zeros(len(group), dtype=torch.bool), torch.ones(len(group), dtype=torch.bool)):
        outcome = term.judge(pooled, correct, group, kept, 1)
        assert outcome.num_valid == 0
        assert outcome.reward.abs().max() == 0
        assert term.learn(pooled, correct, group, kept, 1, outcome.num_valid) == 0
    assert all(torch.equal(term.head.state_dict()[name], value) for name, value in before.items())


def test_frozen_head_comes_from_its_file_and_stays(ranks, tmp_path):
    donor = ContrastiveTerm(ContrastiveConfig(head_output_size=8), HIDDEN, 9, ranks)
    path = tmp_path / "head.safetensors"
    save_file(donor.head.state_dict(), path)
    config = ContrastiveConfig(head_output_size=8, head_path=str(path), freeze_head=True)
    term = ContrastiveTerm(config, HIDDEN, 0, ranks)
    assert term.learn(*data(), rows_of(range(NUM_GROUPS)), 1, 5) == 0
    for name, value in donor.head.state_dict().items():
        assert torch.equal(term.head.state_dict()[name], value)
    with pytest.raises(InputError, match=r"contrastive\.head_path"):
        ContrastiveTerm(ContrastiveConfig(head_output_size=9, head_path=str(path)), HIDDEN, 0, ranks)
    with pytest.raises(InputError, match="not there"):
        ContrastiveTerm(ContrastiveConfig(head_path="nowhere"), HIDDEN, 0, ranks)


def test_ranks_share_everything_once():
    for world_size in (1, 2, 3, 7):
        shares = [Ranks(rank, world_size, rank, CPU).share(10) for rank in range(world_size)]
        assert [i for share in shares for i in share] == list(range(10))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
