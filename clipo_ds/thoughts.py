r"""Thoughts of a response, between tags such as ``<think>`` and ``</think>``: no final answer is looked for in them.

Imports the standard library only. What follows the last closing tag is the response proper; a thought that never closes
leaves none. Models write other tags, and chat templates may open the thought themselves, at the end of the prompt, so
that the response holds the closing tag alone. Which tags count, in this order:

- those of `data.thought_tags`, where it is given, and no others;
- else the well-known ones, and those that look like tags of thoughts in the model's chat template.

Many of the tags are special tokens, which decoding drops: `ResponseDecoder` keeps them in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = r"(?:[\w.]+[:|])?(?:think(?:ing)?|thoughts?)(?:[_:]\w+)?"
_OPENING = (
    rf"<{_NAME}>|\[think\]|<\|(?:(?:begin|start)(?:_of)?_)?(?:think(?:ing)?|thought)(?:_(?:start|begin))?\|>"
    r"|\u25c1think\u25b7|<\|channel\|>analysis<\|message\|>|<\|channel>thought|<\|open\|>think<\|sep\|>"
)
_CLOSING = (
    rf"</{_NAME}>|\[/think\]|<\|(?:/|end(?:_of)?_)(?:think(?:ing)?|thought)\|>|<\|(?:think(?:ing)?|thought)_end\|>"
    r"|\u25c1/think\u25b7|<\|channel\|>final<\|message\|>|<channel\|>|<\|close\|>think<\|sep\|>"
)
_TAG_PARTS = ("<|channel|>", "<|message|>", "<|channel>", "<channel|>", "<|open|>", "<|close|>", "<|sep|>")
"""Tokens of which a tag above is made, in models where it is not one token."""

_THOUGHT = r"[\w:.|-]*(?:think|thought|reason|reflect|ponder|scratchpad)[\w:.-]*"
_TEMPLATE_CLOSING = re.compile(
    rf"<(/)({_THOUGHT})>|\[(/)({_THOUGHT})\]|<\|(/)({_THOUGHT})\|>|<\|(end_of_|end_)({_THOUGHT})\|>", re.IGNORECASE
)


@dataclass(frozen=True)
class ThoughtTags:
    r"""The tags between which thoughts stand.

    >>> KNOWN_TAGS.after("<think>Is it \\boxed{3}?</think>It is 4.", ), KNOWN_TAGS.after("<think>Is it \\boxed{3}?")
    ('It is 4.', None)
    >>> KNOWN_TAGS.opened_by("<|assistant|>\n<think>\n"), KNOWN_TAGS.opened_by("<think>\n\n</think>\n\n")
    ('<think>', '')
    """

    tag: re.Pattern[str]  # group `opening` or group `closing`
    hints: tuple[str, ...]  # in lower case; a text with none of them has no tag

    def after(self, text: str) -> str | None:
        """What follows the thoughts; the whole text where there are none, None where the last one never closes."""
        lower = text.lower()
        if not any(hint in lower for hint in self.hints):  # most texts, and a hundred times as fast
            return text
        last = None
        for last in self.tag.finditer(text):  # noqa: B007, the last match is wanted
            pass
        if last is None:
            return text
        return text[last.end() :] if last.lastgroup == "closing" else None

    def opened_by(self, prompt: str) -> str:
        """The opening tag at a prompt's very end, which the response to it goes on from, else nothing."""
        tail = prompt[-200:].rstrip()
        last = None
        for last in self.tag.finditer(tail):  # noqa: B007
            pass
        return last.group() if last and last.lastgroup == "opening" and last.end() == len(tail) else ""

    def has_part(self, token: str) -> bool:
        """Whether a special token is a tag, or one of the tokens that spell a tag."""
        return self.tag.fullmatch(token) is not None or (token in _TAG_PARTS and re.escape(token) in self.tag.pattern)


def _compiled(opening: Iterable[str], closing: Iterable[str], hints: Iterable[str]) -> ThoughtTags:
    # With no tags at all both groups are what no text holds.
    opened, closed = ("|".join(patterns) or r"(?!)" for patterns in (opening, closing))
    tag = re.compile(f"(?P<opening>{opened})|(?P<closing>{closed})", re.IGNORECASE)
    return ThoughtTags(tag, tuple(dict.fromkeys(hint.lower() for hint in hints)))


_HINTS = ("think", "thought", "channel")
KNOWN_TAGS = _compiled([_OPENING], [_CLOSING], _HINTS)


def thought_tags(given: Sequence[str] | None, chat_template: object = None) -> ThoughtTags:
    """The tags of a run.

    Args:
        given: `data.thought_tags`: opening and closing tags in turn; empty for none, None for those that are known.
        chat_template: The tokenizer's: a text, named texts, or None.

    >>> thought_tags(["<plan>", "</plan>"]).after("<plan>3?</plan>4"), thought_tags([]).after("<think>3")
    ('4', '<think>3')
    >>> thought_tags(None, "{{ content.split('</reasoning>')[-1] }}").after("<reasoning>3?") is None
    True
    """
    if given is not None:
        return _compiled(map(re.escape, given[::2]), map(re.escape, given[1::2]), given)
    templates = chat_template.values() if isinstance(chat_template, dict) else [chat_template or ""]
    opening, closing, hints = [_OPENING], [_CLOSING], [*_HINTS]
    for found in _TEMPLATE_CLOSING.finditer("\n".join(map(str, templates))):
        mark, name = (group for group in found.groups() if group)
        hints.append(name)
        closing.append(re.escape(found.group()))
        opening.append(re.escape(found.group().replace(mark, "", 1)))
        if mark != "/":  # <|end_of_thought|> is opened by <|begin_of_thought|>
            opening += [
                re.escape(re.sub("end", word, found.group(), count=1, flags=re.I)) for word in ("begin", "start")
            ]
    return _compiled(dict.fromkeys(opening), dict.fromkeys(closing), hints)


def response_decoder(tokenizer: PreTrainedTokenizerBase, given: Sequence[str] | None) -> ResponseDecoder:
    """The decoder of a tokenizer's responses, with `data.thought_tags` as given."""
    return ResponseDecoder(tokenizer, thought_tags(given, tokenizer.chat_template))


class ResponseDecoder:
    """Tokens of a response -> its text, without special tokens but for those that are tags of thoughts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: ThoughtTags) -> None:
        self._tokenizer = tokenizer
        self._kept = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and tags.has_part(token.content)
        }

    def __call__(self, token_ids: Sequence[int]) -> str:
        if self._kept.keys().isdisjoint(token_ids):
            return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
        pieces, start = [], 0
        for end, token in enumerate([*token_ids, None]):
            if token is None or token in self._kept:
                if end > start:
                    pieces.append(str(self._tokenizer.decode(list(token_ids[start:end]), skip_special_tokens=True)))
                pieces += [] if token is None else [self._kept[token]]
                start = end + 1
        return "".join(pieces)
