"""The contrastive term of one run: the head with its optimiser, and what it says about a rollout batch.

`ContrastiveTerm.judge` gives the contrastive loss and reward of this rank's rollouts under the head as it stands;
`ContrastiveTerm.learn` then takes the head's one optimiser step on the same batch, so that rewards never see the
update they caused. The head is small: it is replicated, and its gradients are summed over ranks with the global
number of valid anchors under them, which keeps it identical on every rank. Groups that dynamic sampling dropped are
embedded for the records, and are neither anchors nor anybody's positives or negatives; a rank that kept none takes part
in every collective all the same.

Where it goes beyond the paper (arXiv 2603.10101): `debias`, `denominator: negatives`, `head: none`, group-centred
rewards, the shuffled placebo and the differentiable embedding path are options of this program, all off by default.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipo_ds import distributed
from clipo_ds.contrastive import (
    ContrastiveHead,
    ContrastiveLoss,
    centred_contrastive_reward,
    contrastive_loss,
    contrastive_reward,
    debias_states,
    shuffle_within_groups,
    within_group_similarity,
)
from clipo_ds.distributed import Ranks
from clipo_ds.schema import ContrastiveConfig
from clipo_ds.types import InputError

PURPOSES = ("positives", "placebo")


@dataclass(frozen=True)
class ContrastiveOutcome:
    """What the term says about this rank's N rollouts."""

    loss: Tensor  # Float[N], 0 where not valid
    valid: Tensor  # Bool[N], never in a dropped group
    reward: Tensor  # Float[N], 0 where not valid
    embeddings: Tensor  # Float[N, D], unit rows
    pooled_gradient: Tensor | None  # Float[N, H]: d (mean loss over the global batch) / d pooled, for the policy's loss
    num_valid: float  # over all ranks
    mean_loss: float  # over the valid anchors of all ranks, 0 where there are none


class ContrastiveTerm:
    """Holds the head and its AdamW; one instance a rank, all of them equal."""

    def __init__(self, config: ContrastiveConfig, hidden_size: int, seed: int, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self._seed = seed
        # The head's first weights come from a stream of their own, so that switching it on leaves the others alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = ContrastiveHead(hidden_size, config.head_output_size, config.head)
        if config.head_path is not None:
            load_head(self.head, config.head_path)
        self.head.to(ranks.device)
        trained = [] if config.freeze_head else list(self.head.parameters())
        self.optimizer = (
            torch.optim.AdamW(trained, lr=config.head_learning_rate, weight_decay=config.head_weight_decay)
            if trained
            else None
        )

    def judge(self, pooled: Tensor, correct: Tensor, group: Tensor, kept: Tensor, step: int) -> ContrastiveOutcome:
        """Loss and reward of every rollout of this rank under the head as it stands.

        Args:
            pooled: Float[N, H], pooled hidden states; no gradient flows into them.
            correct: Bool[N], the verifier's verdicts.
            group: Int[N], labels that no other rank uses.
            kept: Bool[N], False for the rows of groups that dynamic sampling dropped.
            step: Names the random stream of the drawn positives and of the placebo.

        Raises:
            FloatingPointError: On all ranks, where the embeddings of one are not finite.
        """
        config = self.config
        wants_gradient = config.policy_loss_weight > 0
        states = pooled.detach().requires_grad_(wants_gradient)
        with torch.set_grad_enabled(wants_gradient):
            embeddings, loss, whole = self._loss(states, correct, group, kept, step)
        total = distributed.sum_over_ranks(
            {"loss": float(loss.per_rollout.detach().sum()), "valid": float(loss.valid.sum())}, self.ranks.device
        )
        gradient = None
        if wants_gradient:
            # Anchors of other ranks contrast with this rank's rollouts too: the whole loss is differentiated.
            objective = whole.per_rollout.sum() / max(total["valid"], 1.0)
            (gradient,) = torch.autograd.grad(objective, states, allow_unused=True)
            gradient = torch.zeros_like(states) if gradient is None else gradient
        per_rollout, valid = loss.per_rollout.detach(), loss.valid
        reward = self._reward(per_rollout, valid, group[kept], step)
        return ContrastiveOutcome(
            loss=_at_kept(per_rollout, kept),
            valid=_at_kept(valid, kept),
            reward=_at_kept(reward, kept),
            embeddings=embeddings.detach(),
            pooled_gradient=gradient,
            num_valid=total["valid"],
            mean_loss=total["loss"] / max(total["valid"], 1.0),
        )

    def learn(self, pooled: Tensor, correct: Tensor, group: Tensor, kept: Tensor, step: int, num_valid: float) -> float:
        """One optimiser step of the head on the mean loss over the `num_valid` anchors of the global batch.

        Returns the norm of the head's global gradient; 0 where the head has nothing to learn or is frozen.

        Raises:
            FloatingPointError: The gradient is not finite; the head is unchanged.
        """
        if self.optimizer is None or num_valid == 0:
            return 0.0
        self.optimizer.zero_grad()
        _, loss, _ = self._loss(pooled.detach(), correct, group, kept, step)
        (loss.per_rollout.sum() / num_valid).backward()
        parameters = list(self.head.parameters())
        distributed.sum_gradients(parameters)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not torch.isfinite(torch.tensor(norm)):
            self.optimizer.zero_grad()
            raise FloatingPointError(f"the contrastive head's gradient norm is {norm}")
        self.optimizer.step()
        return norm

    def state(self) -> dict[str, Any]:
        """A copy of head and optimiser, for `restore`."""
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return copy.deepcopy({"head": self.head.state_dict(), "optimizer": optimizer})

    def restore(self, state: dict[str, Any]) -> None:
        """Bring head and optimiser back to what `state` gave."""
        self.head.load_state_dict(state["head"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def is_finite(self) -> bool:
        """Whether all weights of the head are finite."""
        return all(bool(parameter.detach().isfinite().all()) for parameter in self.head.parameters())

    def similarities(self, vectors: Tensor, correct: Tensor, group: Tensor) -> tuple[float, float]:
        """Mean cosine of right-right and of right-wrong pairs within groups, over all ranks; NaN where there are
        none."""
        sums = within_group_similarity(vectors, correct, group)
        total = distributed.sum_over_ranks(
            {
                "positive": float(sums.positive_sum),
                "positives": float(sums.positive_count),
                "negative": float(sums.negative_sum),
                "negatives": float(sums.negative_count),
            },
            self.ranks.device,
        )
        return (
            total["positive"] / total["positives"] if total["positives"] else float("nan"),
            total["negative"] / total["negatives"] if total["negatives"] else float("nan"),
        )

    def head_norm(self) -> float:
        """Euclidean norm of the head's weights; 0 without a head."""
        weights = [p.detach() for p in self.head.parameters()]
        return float(torch.nn.utils.get_total_norm(weights)) if weights else 0.0

    def _loss(
        self, pooled: Tensor, correct: Tensor, group: Tensor, kept: Tensor, step: int
    ) -> tuple[Tensor, ContrastiveLoss, ContrastiveLoss]:
        """Embeddings of this rank's rows, the loss of its kept ones, and the loss of all kept rows that the level lets
        this rank see.

        Contrast beyond the group reaches over ranks: every rank then maps the gathered states of the others through the
        head too, with gradients to the head. Since each rank adds up its own anchors only, the sum of the ranks' head
        gradients is the global one.
        """
        config = self.config
        states = debias_states(pooled, group, config.debias)
        embeddings = self.head(states)
        broken = not bool(embeddings.detach().isfinite().all())
        if distributed.max_over_ranks(float(broken), self.ranks.device):
            raise FloatingPointError("the contrastive embeddings are not finite")
        correct, group, candidates = correct[kept], group[kept], embeddings[kept]
        everyone_correct, first_row = distributed.gather_rows(correct)
        if config.level == "group":
            all_embeddings, all_correct, all_group, rows = candidates, correct, group, slice(0, len(correct))
            generator = self._generator(step, "positives", first_row)
        else:
            generator = self._generator(step, "positives", 0)
            rows = slice(first_row, first_row + len(correct))
            others = self.head(distributed.gather_rows(states[kept])[0])
            all_embeddings = torch.cat([others[: rows.start], candidates, others[rows.stop :]])
            all_correct, all_group = everyone_correct, distributed.gather_rows(group)[0]
        whole = contrastive_loss(
            all_embeddings,
            all_correct,
            all_group,
            loss=config.loss,
            level=config.level,
            similarity=config.similarity,
            denominator=config.denominator,
            temperature=config.temperature,
            generator=generator,
        )
        own = ContrastiveLoss(per_rollout=whole.per_rollout[rows], valid=whole.valid[rows])
        return embeddings, own, whole

    def _reward(self, loss: Tensor, valid: Tensor, group: Tensor, step: int) -> Tensor:
        """Float[K], of the kept rows."""
        config = self.config
        if config.reward_centering == "group":
            reward = centred_contrastive_reward(loss, valid, group, weight=config.weight, floor=config.floor)
        else:
            reward = contrastive_reward(loss, valid, weight=config.weight, floor=config.floor, bonus=config.bonus)
        if config.shuffle:
            _, first_row = distributed.gather_rows(valid)
            generator = self._generator(step, "placebo", first_row)
            reward = shuffle_within_groups(reward, valid, group, generator=generator)
        return reward

    def _generator(self, step: int, purpose: str, first_row: int) -> torch.Generator:
        """A stream of one purpose in one step, in which kept row i of the global batch uses number i on any number of
        ranks."""
        seed = (self._seed * 1_000_003 + step) * 2 + PURPOSES.index(purpose)
        generator = torch.Generator().manual_seed(seed)
        torch.rand(first_row, dtype=torch.float64, generator=generator)  # what the lower ranks draw
        return generator


def _at_kept(values: Tensor, kept: Tensor) -> Tensor:
    """[N]: the values of the kept rows at their places, 0 elsewhere."""
    return values.new_zeros(len(kept)).masked_scatter(kept, values)


def load_head(head: ContrastiveHead, path: str) -> None:
    """Fill a head from a safetensors file.

    Raises:
        InputError: The file is not there or not of this form, or holds a head of another size or kind.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        why = "not there" if isinstance(error, FileNotFoundError) else error
        raise InputError(f"`contrastive.head_path` must be a head.safetensors file, got {path!r} ({why})") from error
    have = {name: tuple(value.shape) for name, value in state.items()}
    want = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    if have != want:
        raise InputError(f"`contrastive.head_path` must hold a head of shapes {want}, got {have} in {path}")
    head.load_state_dict(state)
