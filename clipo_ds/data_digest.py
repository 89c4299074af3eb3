"""What a list of prompts was, in a few characters: a run that goes on can tell whether its data are still the same.

Layer L1: imports `clipo_ds.types`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clipo_ds.types import Prompt

MAX_SOURCES = 50
"""Where rows name more sources than these, they are not told apart."""


def digest_row(messages: Sequence[Mapping[str, str]], ground_truth: str) -> str:
    """A digest of one row as it was read, before the chat template, which may put today's date into the prompt."""
    return hashlib.sha256(json.dumps([messages, ground_truth]).encode()).hexdigest()[:32]


def digest_prompts(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Number and digest of prompts in their order, all together and by their sources, as JSON holds it.

    >>> one, two = (Prompt(uid, text, (1,), "4", "sums") for uid, text in enumerate(["2+2", "1+3"]))
    >>> digest_prompts([one, two])["sources"]["sums"]["prompts"]
    2
    >>> digest_prompts([one, two]) == digest_prompts([two, one])
    False
    """
    by_source: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.source, []).append(prompt)
    # With their numbers, which name the sampler's random streams; one source's digest does not depend on the others.
    whole = _digest(f"{prompt.uid} {_row(prompt)}" for prompt in prompts)
    sources = {source: {"prompts": len(own), "digest": _digest(map(_row, own))} for source, own in by_source.items()}
    if len(sources) > MAX_SOURCES:
        sources = {}
    return {"prompts": len(prompts), "digest": whole, "sources": sources}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In words what differs between two `digest_prompts`; None if nothing does."""
    if before["digest"] == now["digest"]:
        return None
    if before["prompts"] != now["prompts"]:
        said = f"{before['prompts']} prompts then, {now['prompts']} now"
    else:
        said = f"{now['prompts']} prompts, but not the same ones in the same order"
    then, after = before["sources"], now["sources"]
    changed = [source for source in dict.fromkeys([*then, *after]) if then.get(source) != after.get(source)]
    return f"{said} (from {', '.join(changed)})" if changed else said


def _row(prompt: Prompt) -> str:
    # The built-in task has no rows, and its texts are the problems themselves.
    return f"{prompt.kind} {prompt.row or digest_row([{'content': prompt.text}], prompt.ground_truth)}"


def _digest(lines: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for line in lines:
        whole.update(f"{line}\n".encode())
    return whole.hexdigest()[:32]
