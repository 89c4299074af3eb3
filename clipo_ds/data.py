"""Problems become tokenised prompts, and prompts get a reproducible order.

Layer L1: imports `clipo_ds.sources`, which says what a data source is and how its rows are read, `clipo_ds.templates`,
`clipo_ds.schema` and `clipo_ds.answers`, which says whether a ground truth can be verified at all.
"""

from __future__ import annotations

import heapq
import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from clipo_ds.answers import check_ground_truths
from clipo_ds.data_digest import digest_row
from clipo_ds.schema import DataConfig
from clipo_ds.sources import Problem, read_problems
from clipo_ds.templates import ChatTemplate
from clipo_ds.types import InputError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MAX_CHECKED_TRUTHS = 50_000  # of each source: some seconds
BATCH_SIZE = 4096  # rows rendered and tokenised at once
NUM_NAMED = 5


@dataclass(frozen=True)
class LoadedPrompts:
    """What the sources hold after prompts that are too long were dropped."""

    prompts: list[Prompt]
    num_rows: int  # rows read
    num_too_long: int  # rows dropped for `data.max_prompt_tokens`


def load_prompts(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    max_rows: int | None = None,
    field: str = "data.train",
) -> LoadedPrompts:
    """Read all sources, render the chat template and tokenise.

    Rows whose ground truth does not verify against itself are named in a warning and kept; the first
    `MAX_CHECKED_TRUTHS` prompts of each source are looked at.

    Args:
        sources: In the forms that `clipo_ds.sources` lists.
        tokenizer: The policy's; its chat template is used as it is.
        data: `kind`, `max_prompt_tokens`, and what `ChatTemplate` takes.
        max_rows: Read at most the first rows of each source; None reads all.
        field: The setting that named the sources, for messages.

    Returns:
        Prompts in the order of sources and rows. `uid` counts rows over all sources, dropped ones included, so that a
        prompt's random stream does not depend on `data.max_prompt_tokens`.

    Raises:
        InputError: A source is missing, unreadable or empty; a row is malformed (the message names file and row); the
            tokenizer has no chat template, or one that does not open the assistant's turn, refuses the messages or
            needs a name that it is not given; every prompt is too long.
    """
    template = ChatTemplate(tokenizer, data)
    if not sources:
        raise InputError(f"`{field}` must be at least one source, got none")
    prompts: list[Prompt] = []
    lengths: list[int] = []
    for given in sources:
        problems = read_problems(given, field=field, max_rows=max_rows)
        prompts += _read_source(problems, template, tokenizer, data, lengths, field)
    _report_lengths(lengths, len(prompts), data.max_prompt_tokens, field)
    return LoadedPrompts(prompts, len(lengths), len(lengths) - len(prompts))


def _read_source(
    problems: Iterator[Problem],
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    lengths: list[int],
    field: str,
) -> list[Prompt]:
    """The prompts of one source that are not too long; the lengths of all its rows in tokens go on with `lengths`."""
    prompts: list[Prompt] = []
    kind = "choice" if data.kind == "auto" else data.kind
    # A batch after the other, so that a large file is never held in several forms at once.
    while batch := list(islice(problems, BATCH_SIZE)):
        if not lengths:
            template.check(batch[0].messages)
        if data.kind == "auto" and not all(re.fullmatch("[A-J]", problem.ground_truth) for problem in batch):
            kind = "math"
        texts = [template.render(problem.messages, problem.where) for problem in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for problem, text, ids in zip(batch, texts, encoded, strict=True):
            uid = len(lengths)
            lengths.append(len(ids))
            if not ids:
                raise InputError(f"{problem.where}: the prompt must have at least one token, got the text {text!r}")
            if len(ids) <= data.max_prompt_tokens:
                truth, source = problem.ground_truth, problem.source
                prompts.append(
                    Prompt(
                        uid, text, tuple(ids), truth, source, metadata=problem.metadata, where=problem.where,
                        row=digest_row(problem.messages, truth),
                    )
                )  # fmt: skip
    if kind != "math":
        prompts = [replace(prompt, kind=kind) for prompt in prompts]
    _report_truths(prompts[:MAX_CHECKED_TRUTHS], field)
    return prompts


class PromptOrder:
    """The order in which prompts are trained on: one permutation an epoch, known from the seed alone.

    What `batch` gives depends on its arguments only, so a resumed run needs no more than the number of prompts drawn
    before it. The last prompts of an epoch share a batch with the first of the next one, and `size` consecutive draws
    never hold a prompt twice (if there are that many). Draw with one size throughout a run: it shapes the seams between
    epochs.

    >>> order = PromptOrder(num_prompts=5, seed=0)
    >>> sorted([*order.batch(0, 2), *order.batch(2, 2), order.batch(4, 2)[0]])
    [0, 1, 2, 3, 4]
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        if num_prompts < 1:
            raise ValueError(f"`num_prompts` must be at least 1, got {num_prompts}")
        self.num_prompts = num_prompts
        self.seed = seed
        self._epochs: dict[int, list[list[int]]] = {}  # by spacing; each permutation follows from the one before

    def batch(self, position: int, size: int) -> list[int]:
        """Indices of the `size` prompts that follow after `position` draws."""
        spacing = min(size, self.num_prompts)
        drawn = (divmod(position + i, self.num_prompts) for i in range(size))
        return [self._epoch(epoch, spacing)[place] for epoch, place in drawn]

    def _epoch(self, epoch: int, spacing: int) -> list[int]:
        epochs = self._epochs.setdefault(spacing, [])
        while len(epochs) <= epoch:
            # Python promises this stream for every version; numpy's and torch's permutations may change.
            stream = random.Random(f"{self.seed}/{len(epochs)}")
            priority = [stream.random() for _ in range(self.num_prompts)]
            # The first epoch follows no other, so nothing has to keep its distance.
            previous, distance = (epochs[-1], spacing) if epochs else (range(self.num_prompts), 1)
            epochs.append(_spaced_order(previous, priority, distance))
        return epochs[epoch]


def _spaced_order(previous: Sequence[int], priority: Sequence[float], spacing: int) -> list[int]:
    """A permutation in which every item comes at least `spacing` draws after its place in the permutation before.

    Place by place it takes the item of lowest priority among those that are far enough away. There always is one: at
    place i all but `spacing` - 1 - i items are, and only i of them are taken.
    """
    num_free = len(previous) - spacing + 1
    free = [(priority[item], item) for item in previous[:num_free]]
    heapq.heapify(free)
    order = []
    for item in previous[num_free:]:
        order.append(heapq.heappop(free)[1])
        heapq.heappush(free, (priority[item], item))
    return order + [item for _, item in sorted(free)]


def _report_lengths(lengths: Sequence[int], num_kept: int, limit: int, field: str) -> None:
    num_too_long = len(lengths) - num_kept
    if not num_kept:
        raise InputError(
            f"`data.max_prompt_tokens` must be at least {min(lengths)} (tokens of the shortest prompt of `{field}`), "
            f"got {limit}"
        )
    if num_too_long:
        logger.warning(
            "%d of %d prompts of `%s` are longer than `data.max_prompt_tokens` (%d) and left out; the longest has %d",
            num_too_long,
            len(lengths),
            field,
            limit,
            max(lengths),
        )


def _report_truths(prompts: Sequence[Prompt], field: str) -> None:
    failures = check_ground_truths(prompts)
    if not failures:
        return
    named = "; ".join(f"{prompts[failure.position].where}: {failure.reason}" for failure in failures[:NUM_NAMED])
    more = f"; and {len(failures) - NUM_NAMED} more" if len(failures) > NUM_NAMED else ""
    logger.warning(
        "%d of %d ground truths of `%s` do not verify against themselves, no response to them can be right: %s%s",
        len(failures),
        len(prompts),
        field,
        named,
        more,
    )
