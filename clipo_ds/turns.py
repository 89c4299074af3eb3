"""Where a response ends: tokens and texts after which the model's turn is over, and signs that it went on regardless.

Layer L2, imports transformers for annotations only and jinja2 for its errors. What a chat template writes after an
assistant's message is found by rendering a conversation with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from clipo_ds.types import InputError, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER, _NEXT = "First question.", "First answer.", "Second question."
_TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, KeyError)  # of one that does not take such a conversation


@dataclass(frozen=True)
class Turns:
    """What a chat template writes between an assistant's message and the user's next one, without spaces around it."""

    end: str = ""  # of the assistant's turn
    head: str = ""  # of the user's turn


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """The template's words between turns; none where there is no template, or it does not take such a conversation."""
    first = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    last = _after_answer(tokenizer, first).strip()
    between = _after_answer(tokenizer, [*first, {"role": "user", "content": _NEXT}]).partition(_NEXT)[0]
    # Some write another end after the last message than between two (gpt-oss: <|return|> and <|end|>); a response is
    # the last one.
    return Turns(last, between.strip().removeprefix(last).strip())


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token that the chat template writes after the assistant's message, where it is one.

    A template without an end of turns gives the token that the user's next turn begins with.
    """
    turns = turns_of(tokenizer)
    token = _first_token(tokenizer, turns.end or turns.head)
    return frozenset() if token is None else frozenset({token})


def split_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> tuple[frozenset[int], tuple[str, ...]]:
    """`rollout.stop` as tokens, and the texts that are none.

    Raises:
        InputError: A text holds a special token beside other text; decoding drops such tokens, so it would never come.
    """
    tokens = {stop: number for stop in stops if (number := tokenizer.get_added_vocab().get(stop)) is not None}
    special = {
        *tokenizer.all_special_tokens,
        *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
    }
    for stop in stops:
        inside = next((token for token in sorted(special) if token in stop and stop not in tokens), None)
        if inside is not None:
            raise InputError(
                f"`rollout.stop` must be single tokens, or texts without special tokens, got {stop!r} with {inside!r}; "
                "name the token alone"
            )
    return frozenset(tokens.values()), tuple(stop for stop in stops if stop not in tokens)


def completes_stop(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop_texts: Sequence[str]) -> bool:
    """Whether the last token of a response brings one of the texts to its end."""
    if not stop_texts:
        return False
    # A character is at most four tokens, and a decoder may treat the first token of a text otherwise.
    tail = token_ids[-4 * (max(map(len, stop_texts)) + 1) :]
    text = tokenizer.decode(tail, skip_special_tokens=True)
    return any(stop in text for stop in stop_texts)


def spoken_ids(token_ids: Sequence[int], stop_ids: Collection[int]) -> Sequence[int]:
    """A response's tokens without the one that ended it; some tokenizers do not count that among the special ones."""
    return token_ids[:-1] if token_ids and token_ids[-1] in stop_ids else token_ids


def until_stop(text: str, stop_texts: Sequence[str]) -> tuple[str, bool]:
    """What comes before the first of the texts, and whether there was one.

    >>> until_stop("4\\n\\nQuestion: 2+3", ["Question:", "Problem:"])
    ('4\\n\\n', True)
    """
    places = [place for stop in stop_texts if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def runs_on(tokenizer: PreTrainedTokenizerBase, turns: Turns, rollout: Rollout) -> bool:
    """Whether a response goes on into another turn, in the template's own words."""
    for mark in (turns.end, turns.head):
        token = _first_token(tokenizer, mark)
        if token is None:
            found = len(mark) > 1 and mark in rollout.text
        else:  # decoded only where it can be there: responses are many
            found = token in rollout.token_ids[:-1] and mark in tokenizer.decode(rollout.token_ids[:-1])
        if found:
            return True
    return False


def _after_answer(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except _TEMPLATE_ERRORS:
        return ""
    return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The token of its own that a text begins with, special or not; the longest of several."""
    own = {token: number for token, number in tokenizer.get_added_vocab().items() if token and text.startswith(token)}
    return own[max(own, key=len)] if own else None
