"""The chat template of a model's tokenizer, checked once and then applied to every problem.

A template is a program that comes with the model and fails in its own ways: it may refuse roles, need names that nobody
gives it, or end the prompt before the assistant's turn begins. Layer L1: imports jinja2, schema and types.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from clipo_ds.fields import nearest, yaml_text
from clipo_ds.schema import DataConfig
from clipo_ds.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]

# What a template's own code can raise, besides jinja's errors.
_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_PROBLEM, _ANSWER = "7353315", "5318008"  # stand for texts; no template writes them of its own


class _NotGiven(jinja2.Undefined):
    """A name that nothing gives: `is defined` and `if` take it as jinja does, and to write it is an error.

    Jinja itself writes nothing there, and the model reads a prompt with a hole.
    """

    __str__ = jinja2.Undefined._fail_with_undefined_error


class _Generation(Extension):
    """The mark {% generation %} … {% endgeneration %}, by which templates say what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - as jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Turns messages into the text that the model reads.

    Args:
        tokenizer: The policy's; its chat template is used as it is.
        data: `system_prompt` (takes the place of a row's own system message), `instruction` and `template_arguments`.

    Raises:
        InputError: The tokenizer has no chat template, or its template does not read one of the arguments.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        if tokenizer.chat_template is None:
            raise InputError(
                f"`model.path` must be a model whose tokenizer has a chat template, got {tokenizer.name_or_path!r} "
                "without one; take its instruct version, or put a `chat_template.jinja` into a local copy of the "
                "model's folder"
            )
        self._tokenizer, self._data = tokenizer, data
        self._name = repr(tokenizer.name_or_path)
        read, made = self._names()
        for name in data.template_arguments:
            if name not in read:
                near = nearest(name, read)
                raise InputError(
                    f"`data.template_arguments` must be names that the chat template of {self._name} reads "
                    f"({', '.join(sorted(read - made or read)) or 'none'}), got {name!r}"
                    + (f"; did you mean `{near}`?" if near else "")
                )
        self._given = {name: _NotGiven(name=name) for name in read - made} | data.template_arguments

    def render(self, messages: Messages, where: str) -> str:
        """The text of a prompt, up to where the assistant's turn begins.

        Args:
            messages: `role` and `content` each, the last one the user's.
            where: Source and row, for messages.

        Raises:
            InputError: The template refuses the messages, or needs a name that it is not given.
        """
        messages = self._surround(messages)
        try:
            return self._apply(messages, opens=True)
        except _ERRORS as error:
            if isinstance(error, jinja2.UndefinedError) and str(error).endswith(" is undefined"):
                raise InputError(
                    f"{where}: `data.template_arguments` must give what the chat template of {self._name} needs, got "
                    f"{yaml_text(self._data.template_arguments)}: {error}"
                ) from error
            origin = "`data.system_prompt` and the row" if self._data.system_prompt is not None else "the row"
            raise InputError(
                f"{where}: the messages must suit the chat template of {self._name}, got the roles "
                f"{', '.join(m['role'] for m in messages)} from {origin}: {_first_line(error)}"
            ) from error

    def check(self, messages: Messages) -> None:
        """Check that a prompt holds the problem and ends where the assistant's text begins.

        A template may open the turn by `add_generation_prompt`, or need no words for it ([INST] … [/INST]).

        Args:
            messages: Those of a problem that `render` takes.

        Raises:
            InputError: The model would see no problem, or would have to write the head of its own turn.
        """
        messages = self._surround([*messages[:-1], {"role": "user", "content": _PROBLEM}])
        prompt, unopened = self._try(messages, opens=True), self._try(messages, opens=False)
        if prompt is not None and _PROBLEM not in prompt:
            raise InputError(
                f"`model.path` must be a model whose chat template takes messages of plain text, got {self._name}, "
                "whose template leaves the problem out"
            )
        whole = self._try([*messages, {"role": "assistant", "content": _ANSWER}], opens=False)
        # Why a template refuses problems says `render`; one that refuses answers cannot be asked where they begin.
        if prompt is None or prompt != unopened or whole is None:
            return
        head, answered, _ = whole.partition(_ANSWER)
        left_out = head.removeprefix(prompt.rstrip()).strip()
        if answered and head.startswith(prompt.rstrip()) and left_out:
            raise InputError(
                f"`model.path` must be a model whose chat template opens the assistant's turn, got {self._name}, whose "
                f"template leaves {left_out!r} out where `add_generation_prompt` asks for it; add it to the "
                "`chat_template.jinja` of a local copy of the model's folder"
            )

    def _surround(self, messages: Messages) -> Messages:
        instruction, system_prompt = self._data.instruction, self._data.system_prompt
        if instruction is not None:
            messages = [
                {**m, "content": f"{m['content']}\n{instruction}"} if m["role"] == "user" else m for m in messages
            ]
        if system_prompt is not None:
            own = [m for m in messages if m["role"] != "system"]
            messages = [{"role": "system", "content": system_prompt}, *own]
        return messages

    def _apply(self, messages: Messages, *, opens: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=opens, tokenize=False, **self._given
            )
        )

    def _try(self, messages: Messages, *, opens: bool) -> str | None:
        try:
            return self._apply(messages, opens=opens)
        except _ERRORS:
            return None

    def _names(self) -> tuple[set[str], set[str]]:
        """Names that may be given to the template, and those among them that it makes itself on some of its ways."""
        try:
            environment = jinja2.Environment(extensions=[loopcontrols, _Generation])
            syntax = environment.parse(self._tokenizer.get_chat_template())
        except (jinja2.TemplateError, ValueError) as error:
            raise InputError(
                f"`model.path` must be a model with a readable chat template, got {self._name}: {_first_line(error)}"
            ) from error
        # Called are the functions that transformers and jinja have for templates. Special tokens that a tokenizer lacks
        # are written by templates that know that they may be empty.
        called = {call.node.name for call in syntax.find_all(nodes.Call) if isinstance(call.node, nodes.Name)}
        others = {
            "messages",
            "conversations",
            *inspect.signature(self._tokenizer.apply_chat_template).parameters,
            *environment.globals,
        }
        tokens = {name for name in _names_that(syntax, "load") if name.endswith(("_token", "_tokens"))}
        read = meta.find_undeclared_variables(syntax) - called - others - tokens
        return read, read & _names_that(syntax, "store")


def _names_that(syntax: nodes.Template, context: str) -> set[str]:
    """Names that a template loads or stores somewhere."""
    return {name.name for name in syntax.find_all(nodes.Name) if name.ctx == context}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
