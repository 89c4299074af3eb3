"""Responses end where the model's turn does: by the template's own end of a turn, by `rollout.stop`, or with a word."""

from __future__ import annotations

import pytest
import torch
from stops import assert_stops_at
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from clipo_ds.generation import TransformersEngine
from clipo_ds.models import stop_token_ids
from clipo_ds.turns import runs_on, split_stops, turns_of
from clipo_ds.types import InputError, Prompt, Rollout
from clipo_ds.warm_start import build_tokenizer

MARKS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|start|>", "<|message|>", "<|end|>", "<|return|>"]
EACH = "{% for m in messages %}"
CHATML = EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "chatml": (CHATML, {"<|im_end|>"}),
    "an end before white space alone": (EACH + "{{ m.content }}\n<|im_end|>\n{% endfor %}", {"<|im_end|>"}),
    "no end, a head": (EACH + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}", {"<|user|>"}),
    "another end after the last": (
        EACH + "<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}",
        {"<|return|>"},
    ),
    "words": (EACH + "{{ '### Human: ' if m.role == 'user' else '### Robot: ' }}{{ m.content }}\n{% endfor %}", set()),
    "nothing": (EACH + "{{ m.content }}\n{% endfor %}", set()),
    "refused": ("{{ raise_exception('one message alone') }}", set()),
    "absent": (None, set()),
}


def make_tokenizer(template: str | None = CHATML, *, special: bool = True) -> PreTrainedTokenizerBase:
    """The small task's, with a base model's end of text as its only end of sequence."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(MARKS, special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def make_engine(tokenizer: PreTrainedTokenizerBase, **options) -> TransformersEngine:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return TransformersEngine(model, tokenizer, **options)


PROMPTS = [Prompt(uid, "", (4 + uid, 12, 3), "0", "test") for uid in range(4)]


@pytest.mark.parametrize(("template", "ends"), TEMPLATES.values(), ids=TEMPLATES)
def test_what_the_template_writes_after_an_assistants_turn_ends_a_response(template, ends) -> None:
    for special in (True, False):  # base models often have such tokens among the ordinary ones
        tokenizer = make_tokenizer(template, special=special)
        expected = {1, *tokenizer.convert_tokens_to_ids(sorted(ends))}
        assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=1)) == expected


@pytest.mark.parametrize("special", [True, False])
def test_a_base_models_rollouts_end_with_their_turn_and_without_its_mark_in_the_text(special: bool) -> None:
    tokenizer = make_tokenizer(special=special)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    groups = make_engine(tokenizer).generate(PROMPTS, 8, max_new_tokens=60, seed=0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.token_ids[-1] for rollout in rollouts} >= {1, end}
    assert all(end not in rollout.token_ids[:-1] and "<|im_end|>" not in rollout.text for rollout in rollouts)
    assert all(not rollout.truncated for rollout in rollouts if rollout.token_ids[-1] == end)


@pytest.mark.parametrize("stop", ["=", "+1"])
def test_a_stop_text_ends_a_response_where_it_is_complete(stop: str) -> None:
    tokenizer = make_tokenizer(None)
    free = make_engine(tokenizer).generate(PROMPTS, 16, max_new_tokens=40, seed=3)
    for most in (3, 64):
        engine = make_engine(tokenizer, stop_texts=[stop], max_sequences=most)
        stopped = engine.generate(PROMPTS, 16, max_new_tokens=40, seed=3)
        assert_stops_at(stop, stopped, free, tokenizer, 1e-5)


def test_rollout_stop_takes_tokens_and_texts_apart() -> None:
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert split_stops(tokenizer, ["<|end|>", "Question:", "="]) == ({end}, ("Question:", "="))
    with pytest.raises(InputError, match=r"`rollout.stop` must be single tokens.* got '<\|end\|>\\n' with '<\|end\|>'"):
        split_stops(tokenizer, ["<|end|>\n"])


def test_a_response_that_begins_another_turn_is_seen() -> None:
    def rollout(*tokens: str, text: str = "") -> Rollout:
        ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
        return Rollout(ids, (0.0,) * len(ids), text, True)

    tokenizer = make_tokenizer(EACH + "<|start|>{{ 7 if m.role == 'user' else 8 }}{{ m.content }}{% endfor %}")
    turns = turns_of(tokenizer)
    assert runs_on(tokenizer, turns, rollout("3", "<|start|>", "7", "1"))
    assert not runs_on(tokenizer, turns, rollout("3", "<|start|>", "8", "1"))  # a turn of its own
    assert not runs_on(tokenizer, turns, rollout("3", "7", "<|start|>"))  # that ended it
    words = turns_of(make_tokenizer(TEMPLATES["words"][0]))
    assert runs_on(tokenizer, words, rollout("3", text="It is 3.\n### Human: And 4?"))
    assert not runs_on(tokenizer, words, rollout("3", text="It is 3."))
    assert not runs_on(tokenizer, turns_of(make_tokenizer(None)), rollout("3", text="It is 3."))
