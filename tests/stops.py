"""What stopping at a text means, for every sampler alike."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from clipo_ds.thoughts import response_decoder
from clipo_ds.types import Group


def assert_stops_at(
    stop: str, stopped: Sequence[Group], free: Sequence[Group], tokenizer: PreTrainedTokenizerBase, logprob_gap: float
) -> None:
    """The same rollouts with and without a stop text: tokens and log-probabilities up to the one that completes it."""
    ends = set()
    for group, other in zip(stopped, free, strict=True):
        for short, long in zip(group.rollouts, other.rollouts, strict=True):
            before, found, _ = long.text.partition(stop)
            length = len(short.token_ids)
            assert short.token_ids == long.token_ids[:length] and len(short.logprobs) == length
            gaps = [abs(a - b) for a, b in zip(short.logprobs, long.logprobs[:length], strict=True)]
            assert max(gaps) <= logprob_gap
            assert short.text == before and short.truncated == (long.truncated and not found)
            if found:
                whole = response_decoder(tokenizer, None)(short.token_ids)
                assert whole == before + stop  # a token is a character here
            else:
                assert length == len(long.token_ids)
            ends.add(bool(found))
    assert ends == {True, False}
