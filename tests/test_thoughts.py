"""Thoughts hold no answer: which tags count, where they come from, and that they survive decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, GenerationConfig, LlamaConfig, LlamaForCausalLM

from clipo_ds.answers import AnswerVerifier, verify_answer
from clipo_ds.generation import TransformersEngine
from clipo_ds.rewards import Judge
from clipo_ds.schema import DataConfig, RewardConfig
from clipo_ds.thoughts import KNOWN_TAGS, ResponseDecoder, response_decoder, thought_tags
from clipo_ds.types import Group, InputError, Prompt, Rollout
from clipo_ds.warm_start import build_tokenizer

PAIRS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("\N{WHITE LEFT-POINTING TRIANGLE}think\N{WHITE RIGHT-POINTING TRIANGLE}",
     "\N{WHITE LEFT-POINTING TRIANGLE}/think\N{WHITE RIGHT-POINTING TRIANGLE}"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
]  # fmt: skip


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_the_box_of_a_thought_is_no_answer(opening, closing):
    thought = rf"{opening}Is it \boxed{{3}}? The answer is 3."
    assert verify_answer(rf"{thought}{closing}It is \boxed{{4}}.", "4").correct
    for text in (thought, rf"{thought}{closing}", rf"\boxed{{3}}{closing}", rf"a{closing}b{thought}"):
        assert verify_answer(text, "3").status == "no_answer"
        assert verify_answer(text, "3", kind="choice").status == "no_answer"
    assert verify_answer(rf"{thought}{closing}4", "4").extracted == "4"


def test_a_choice_is_read_behind_the_thought():
    # The box in the thought must not decide how the sentence behind it is read.
    assert verify_answer(r"<think>\boxed{A}</think>The answer is B because of that.", "B", kind="choice").correct


def test_texts_without_tags_are_whole():
    for text in ("I think 3 < 4.", "a thought: [1, 2]", "x <think", "[thinking]", "the <b>channel</b>"):
        assert KNOWN_TAGS.after(text) == text


def test_tags_come_from_the_template_too():
    text = r"<reasoning>\boxed{3}</reasoning>\boxed{4}"
    assert KNOWN_TAGS.after(text) == text
    for template in ("{{ c.split('</reasoning>')[-1] }}", {"default": "x", "tool": "</reasoning>"}):
        assert thought_tags(None, template).after(text) == r"\boxed{4}"
        assert thought_tags(None, template).after(text[:-20]) is None
        assert thought_tags(None, template).after("<think>3</think>4") == "4"
    of_marks = thought_tags(None, "{{ c.split('<|end_of_reflection|>')[-1] }}")
    assert of_marks.after("<|begin_of_reflection|>3") is None and of_marks.after("3<|end_of_reflection|>4") == "4"
    assert thought_tags(None, None).after("<tool_call>3</tool_call>") == "<tool_call>3</tool_call>"


def test_given_tags_count_alone():
    tags = thought_tags(["(((", ")))"], "</think>")
    assert tags.after("(((3)))4") == "4" and tags.after("(((3") is None and tags.after("<think>3") == "<think>3"
    with AnswerVerifier(tags=thought_tags([])) as verifier:
        assert verifier.verify_many([r"<think>\boxed{4}"], ["4"])[0].correct
    for wrong in (["<think>"], ["<a>", "<a>"], ["<a>", " "]):
        with pytest.raises(InputError, match=r"`data\.thought_tags` must be null or pairs"):
            DataConfig(thought_tags=wrong)


@pytest.mark.parametrize(
    ("prompt", "response", "correct"),
    [
        ("<user>1+3?<assistant><think>\n", r"Is it \boxed{3}?</think>\boxed{4}", True),
        ("<user>1+3?<assistant><think>\n", r"It is \boxed{4}", False),  # all of it thought
        ("<user>1+3?<assistant><think>\n\n</think>\n\n", r"It is \boxed{4}", True),
        ("<user>Think in <think> tags.<assistant>", r"It is \boxed{4}", True),
        ("<user>1+3?<assistant>[THINK]", r"\boxed{3}[/THINK] It is 4. The answer is 4.", True),
    ],
)
def test_a_thought_that_the_prompt_opens_has_to_be_closed(prompt, response, correct):
    group = Group(Prompt(0, prompt, (1,), "4", "mine"), (Rollout((2,), (-1.0,), response, False),))
    with Judge(RewardConfig(), max_new_tokens=10) as judge:
        [[judgement]] = judge.judge([group])
    assert judgement.correct is correct
    assert correct or judgement.status == "no_answer"


@pytest.fixture(scope="module")
def tokenizer():
    """The character tokenizer with two special tokens that are tags and one that is none."""
    tokenizer = build_tokenizer()
    specials = [AddedToken(text, special=True, normalized=False) for text in ("[THINK]", "[/THINK]", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    return tokenizer


def test_decoding_keeps_the_tags_and_drops_other_special_tokens(tokenizer):
    ids = tokenizer("[THINK]7+5=12[/THINK]#12<|end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "7+5=12#12"  # where the tags were lost
    decode = response_decoder(tokenizer, None)
    assert decode([*ids, 1]) == "[THINK]7+5=12[/THINK]#12"
    assert decode([]) == "" and decode(ids[1:6]) == "7+5=1" and decode(tuple(ids[:1])) == "[THINK]"
    assert response_decoder(tokenizer, ["<a>", "</a>"])(ids) == "7+5=12#12"
    assert response_decoder(tokenizer, ["<|end|>", "</a>"])(ids) == "7+5=12#12<|end|>"


@given(st.lists(st.integers(2, 17), max_size=20))
def test_without_tags_decoding_is_the_tokenizers_own(ids):
    plain = build_tokenizer()
    assert ResponseDecoder(plain, KNOWN_TAGS)(ids) == plain.decode(ids, skip_special_tokens=True)


def test_sampled_responses_keep_their_tags(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    engine = TransformersEngine(model, tokenizer)
    [group] = engine.generate([Prompt(0, "7", (9,), "4", "mine")], 16, max_new_tokens=12, seed=0)
    tag = tokenizer.convert_tokens_to_ids("[/THINK]")
    num_tags = [rollout.token_ids.count(tag) for rollout in group.rollouts]
    assert sum(num_tags) > 0
    assert [rollout.text.count("[/THINK]") for rollout in group.rollouts] == num_tags
