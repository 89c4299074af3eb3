"""The values that travel through one training step, as frozen dataclasses.

This is the bottom layer: it imports nothing of the package, and torch for annotations only, so that the
run-folder reader and the notebooks can use it on a machine without torch.

Letters in the shape comments: P prompts, G rollouts a prompt (the group size), N = P * G rollouts,
R sequences of S tokens in a forward pass, T response tokens, H hidden size, D embedding size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class InputError(ValueError):
    """Something the user gave is wrong; the message names the field, the value and what would be right.

    The command line prints it as one line and ends with exit code 2; every other exception keeps its traceback.
    """


class MismatchError(RuntimeError):
    """Sampler and trainer disagree about the sampled tokens by more than the limits of `rollout.parity`."""


class RunStopped(Exception):
    """A signal ended a run before its last step; the message names the checkpoint that holds what was done."""


class SamplerLost(RuntimeError):
    """The sampler cannot go on: a server died, or new weights did not reach it. The message names it."""


class VerifierLost(RuntimeError):
    """No answer can be verified: the processes that do the algebra do not start, or die at whatever they are asked.

    The message has what one of them said last. Judging goes no further: every answer would count as wrong.
    """


class NotSaved(RuntimeError):
    """The disk does not take what a run writes. The message names the file, the room left and what is whole."""


@dataclass(frozen=True)
class Prompt:
    """One problem, rendered with the chat template and tokenised."""

    uid: int  # position in the training (or test) set: names the sampler's random stream
    text: str  # what the model reads, special tokens included
    token_ids: tuple[int, ...]
    ground_truth: str
    source: str  # `data_source` of the row, or the file's stem
    kind: str = "math"  # which verifier judges the answer: math | choice | arithmetic
    metadata: Mapping[str, Any] = field(default_factory=dict)  # other columns, for user reward functions
    where: str = field(default="", compare=False)  # file and row, for messages; empty in the built-in task
    row: str = ""  # digest of problem and truth as they were read: the chat template may put the date into `text`


@dataclass(frozen=True)
class Rollout:
    """One sampled response."""

    token_ids: tuple[int, ...]  # [T], the end-of-sequence token included when it was sampled
    logprobs: tuple[float, ...]  # [T], the sampler's natural-log probabilities at temperature 1
    text: str  # decoded without special tokens, except tags of thoughts
    truncated: bool  # the length cap came before the end-of-sequence token


@dataclass(frozen=True)
class Group:
    """The rollouts of one prompt; a group stays whole on one rank."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]  # [G]


@dataclass(frozen=True)
class Batch:
    """A right-padded micro-batch for one forward pass: N rollouts in R sequences.

    A sequence is a prompt and behind it the responses of one or more of its rollouts, without gaps. `segments` tells
    them apart: 0 on the prompt, k on the k-th response, -1 on padding. A token sees the prompt and what comes before it
    in its own response, and `position_ids` count as if every rollout stood alone.
    """

    input_ids: Tensor  # Int[R, S]
    segments: Tensor  # Int[R, S]
    position_ids: Tensor  # Int[R, S], 0 on padding
    sequence: Tensor  # Int[N], the sequence that holds the rollout
    state_columns: Tensor  # Int[N, T], the column whose hidden state *produced* the response token
    response_ids: Tensor  # Int[N, T]
    response_mask: Tensor  # Bool[N, T]
    rows: Sequence[int]  # [N], positions in the rank's flat list of rollouts
    shares_prompts: bool = False  # some sequence holds more than one response
    is_padding: bool = False  # a zero-weight batch that only keeps the ranks' collectives in step
