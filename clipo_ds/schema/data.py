"""Training and test data: which files, which verifier, what is put around a prompt and how long one may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from clipo_ds.schema.base import require


@dataclass(frozen=True)
class DataConfig:
    train: list[str] = field(default_factory=list)
    """Training data: parquet or jsonl files, Hugging Face dataset ids (`org/name`, `org/name:split`), or
    `recipes:NAME` for a file that is shipped beside the recipes."""
    test: list[str] = field(default_factory=list)
    """Test data for the evaluation during training, in the same forms."""
    kind: Literal["auto", "math", "choice"] = "auto"
    """Which verifier judges the answers; `auto` takes `choice` where every ground truth of a file is one letter, A to
    J."""
    system_prompt: str | None = None
    """System message put before every prompt, in place of the row's own; null leaves the rows as they are."""
    instruction: str | None = None
    """Text appended to every user message, after a line break; null adds nothing."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Names and values for the model's chat template, as `{enable_thinking: false}`; only names that it reads are
    taken. Evaluations of the run use them too."""
    thought_tags: list[str] | None = None
    """Opening and closing tags of the model's thoughts in turn (`["<think>", "</think>"]`), between which no answer is
    looked for; null takes the usual ones and those of the chat template, `[]` none."""
    max_prompt_tokens: int = 512
    """Prompts longer than this, in tokens, are dropped and counted."""
    max_rows: int | None = None
    """Read at most this many rows of each training file; null reads all."""
    allow_changed: bool = False
    """Let a resumed run go on with training data whose rows, order or truths are others than those of the run so far,
    which is refused otherwise. It holds for the start that it is given to; config.yaml says false again."""

    def __post_init__(self) -> None:
        tags = self.thought_tags or []
        in_pairs = len(tags) % 2 == 0 and all(tag.strip() for tag in tags) and len(set(tags)) == len(tags)
        rule = "null or pairs of an opening and a closing tag, all different"
        require(in_pairs, "data.thought_tags", rule, self.thought_tags)
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens", "at least 1", self.max_prompt_tokens)
        require(self.max_rows is None or self.max_rows >= 1, "data.max_rows", "null or at least 1", self.max_rows)
