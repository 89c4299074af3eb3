"""Prompts carry the template's text and the row's answer; the order of prompts can be resumed from a number."""

from __future__ import annotations

import importlib.util
import json
import logging
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from clipo_ds.config import load_config
from clipo_ds.data import PromptOrder, load_prompts
from clipo_ds.schema import DataConfig
from clipo_ds.standalone import _test_data, _test_prompts
from clipo_ds.templates import ChatTemplate
from clipo_ds.types import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"
TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"  # of published models
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}</>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROSE = "She sells 9 eggs for 2 dollars each, so every day she makes 9 * 2 = 18 dollars with them."  # which number?


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(TEMPLATE)


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rlvr_row(problem: str, truth: str, index: int = 0) -> dict:
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": problem}],
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


def test_a_parquet_row_becomes_a_prompt(tmp_path, tokenizer):
    path = tmp_path / "sums.parquet"
    pq.write_table(pa.Table.from_pylist([rlvr_row("1+1?", "2", 0), rlvr_row("2+2?", "4", 1)]), path)
    loaded = load_prompts([str(path)], tokenizer, DataConfig())
    assert (loaded.num_rows, loaded.num_too_long) == (2, 0)
    first, second = loaded.prompts
    assert first.text == "<user>1+1?</><assistant>"
    assert tokenizer.decode(first.token_ids) == first.text
    assert (first.uid, first.ground_truth, first.source, first.kind) == (0, "2", "sums", "math")
    assert first.metadata == {"ability": "math", "extra_info": {"index": 0, "split": "train"}}
    assert (second.uid, second.ground_truth) == (1, "4")


def test_a_ground_truth_that_nothing_can_equal_is_named_by_file_and_row(tmp_path, tokenizer, caplog):
    good = write_jsonl(tmp_path / "good.jsonl", [rlvr_row("1+1?", "2")] * 3)
    path = write_jsonl(tmp_path / "bad.jsonl", [rlvr_row("1+1?", t) for t in ("2", r"so $\boxed{}$", "x" * 3, PROSE)])
    load_prompts([good], tokenizer, DataConfig())
    assert caplog.messages == []
    loaded = load_prompts([good, path], tokenizer, DataConfig(), field="data.test")
    assert len(loaded.prompts) == 7
    (line,) = caplog.messages
    assert line.startswith("2 of 4 ground truths of `data.test` do not verify against themselves")
    assert line.endswith(f"{path}, row 1 (line 2): no_truth; {path}, row 3 (line 4): no_truth")


def test_jsonl_in_the_same_layout_gives_the_same_prompts(tmp_path, tokenizer):
    rows = [rlvr_row("1+1?", "2", 0), rlvr_row("2+2?", "4", 1)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sums.parquet")
    jsonl = write_jsonl(tmp_path / "sums.jsonl", rows)
    parquet = str(tmp_path / "sums.parquet")
    assert load_prompts([jsonl], tokenizer, DataConfig()) == load_prompts([parquet], tokenizer, DataConfig())


def test_uids_run_over_all_sources_and_over_dropped_rows(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", [{"question": "x" * 100, "answer": "1"}, {"question": "1?", "answer": "1"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"question": "2?", "answer": "2"}])
    loaded = load_prompts([a, b], tokenizer, DataConfig(max_prompt_tokens=50))
    assert [(p.uid, p.source) for p in loaded.prompts] == [(1, "a"), (2, "b")]
    assert (loaded.num_rows, loaded.num_too_long) == (3, 1)


def test_system_prompt_and_instruction_are_put_around_the_problem(tmp_path, tokenizer):
    messages = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": messages, "answer": 1}])
    plain = load_prompts([path], tokenizer, DataConfig()).prompts[0].text
    assert plain == "<system>old</><user>a</><assistant>b</><user>c</><assistant>"
    data = DataConfig(system_prompt="new", instruction="think")
    changed = load_prompts([path], tokenizer, data).prompts[0].text
    assert changed == "<system>new</><user>a\nthink</><assistant>b</><user>c\nthink</><assistant>"


def test_prompts_that_are_too_long_are_dropped_counted_and_named(tmp_path, tokenizer, caplog):
    rows = [{"question": "x" * length, "answer": "1"} for length in (1, 10, 100)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    # The template adds 6 + 3 + 11 = 20 bytes: prompts of 21, 30 and 120 tokens.
    with caplog.at_level(logging.WARNING, "clipo_ds.data"):
        loaded = load_prompts([path], tokenizer, DataConfig(max_prompt_tokens=30))
    assert [len(p.token_ids) for p in loaded.prompts] == [21, 30]
    assert loaded.num_too_long == 1
    assert "1 of 3 prompts of `data.train` are longer than `data.max_prompt_tokens` (30)" in caplog.text
    assert "the longest has 120" in caplog.text


def test_all_prompts_too_long_is_an_error_that_names_the_setting(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "xx", "answer": "1"}])
    with pytest.raises(InputError, match=r"`data.max_prompt_tokens` must be at least 22 .*`data.test`.*, got 5"):
        load_prompts([path], tokenizer, DataConfig(max_prompt_tokens=5), field="data.test")


def test_max_rows_takes_the_first_rows_of_each_source(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", [{"question": f"a{i}", "answer": i} for i in range(5)])
    path = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": f"b{i}", "answer": i} for i in range(5)]), path)
    loaded = load_prompts([a, str(path)], tokenizer, DataConfig(), max_rows=2)
    assert [p.text[6:8] for p in loaded.prompts] == ["a0", "a1", "b0", "b1"]
    assert loaded.num_rows == 4


def test_the_verifier_is_chosen_by_file(tmp_path, tokenizer):
    letters = write_jsonl(tmp_path / "letters.jsonl", [{"question": "q", "answer": x} for x in "ABCJ"])
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{"question": "q", "answer": x} for x in ("A", "7")])
    loaded = load_prompts([letters, mixed], tokenizer, DataConfig())
    assert [p.kind for p in loaded.prompts] == ["choice"] * 4 + ["math"] * 2
    loaded = load_prompts([letters, mixed], tokenizer, DataConfig(kind="math"))
    assert {p.kind for p in loaded.prompts} == {"math"}


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(tmp_path):
    base = byte_tokenizer(None)
    with pytest.raises(InputError, match=r"`model.path` .* got 'tiny-instruct' without one; take its instruct version"):
        load_prompts([str(tmp_path / "not_even_looked_at.jsonl")], base, DataConfig())


THOUGHTFUL = TEMPLATE.replace(
    "<assistant>", "<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def test_template_arguments_reach_the_template_in_training_and_in_the_evaluation_of_a_run(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "1+1?", "answer": 2}])
    thoughtful = byte_tokenizer(THOUGHTFUL)
    assert load_prompts([path], thoughtful, DataConfig()).prompts[0].text.endswith("</><assistant>")
    overrides = ["--data.template_arguments={enable_thinking: false}"]
    config = load_config("smollm2_cpu", overrides)
    ends = "</><assistant><think></think>"
    assert load_prompts([path], thoughtful, config.data).prompts[0].text.endswith(ends)
    given = {"data": [path], "system_prompt": None, "instruction": None, "max_prompt_tokens": 100, "max_problems": None}
    arguments = Namespace(**given)
    (evaluated,) = _test_prompts(arguments, config, *_test_data(arguments, config), thoughtful)["x"]
    assert evaluated.text.endswith(ends)


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        (
            THOUGHTFUL,
            {"enable_thinkin": False},
            r"`data.template_arguments` must be names that the chat template of 'tiny-instruct' reads "
            r"\(enable_thinking\), got 'enable_thinkin'; did you mean `enable_thinking`\?",
        ),
        (TEMPLATE, {"tools": []}, r"`data.template_arguments` must be names .* reads \(none\), got 'tools'"),
        (
            "{{ date }}" + TEMPLATE,
            {},
            r"row 0 \(line 1\): `data.template_arguments` must give what .* needs, got \{\}: 'date' is undefined",
        ),
        (TEMPLATE + "{{ user.name }}", {}, r"`data.template_arguments` must give .*: 'user' is undefined"),
        (TEMPLATE + "{{ messages[0].id.x }}", {}, r"the messages must suit .*: 'dict object' has no attribute 'id'"),
        (TEMPLATE + "{{ 1 + none }}", {}, r"x.jsonl, row 0 \(line 1\): the messages must suit .*: unsupported operand"),
        (TEMPLATE + "{% if %}", {}, r"`model.path` must be a model with a readable chat template, got 'tiny-instruct'"),
        (
            TEMPLATE.partition("{% if add_generation_prompt")[0],
            {},
            r"`model.path` must be a model whose chat template opens the assistant's turn, .* leaves '<assistant>' out",
        ),
        (
            TEMPLATE.replace("message['content']", "message['content'][0]['text']"),  # written for pictures and text
            {},
            r"`model.path` must be a model whose chat template takes messages of plain text, got 'tiny-instruct'",
        ),
    ],
)
def test_a_template_that_cannot_make_prompts_is_refused_in_one_line(tmp_path, template, arguments, message):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "1+1?", "answer": 2}])
    with pytest.raises(InputError, match=message) as caught:
        load_prompts([path], byte_tokenizer(template), DataConfig(template_arguments=arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # Mistral's opens the assistant's turn without being asked.
        ("{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else m.content }}{% endfor %}",
         "[I]a[/I]"),
        # Names that the template makes in a branch, tokens that the tokenizer lacks, names with defaults or conditions.
        ("{% if no %}{% set made = 1 %}{% endif %}{{ made }}{{ bos_token }}" + TEMPLATE, "<user>a</><assistant>"),
        ("{{ day | default('') }}{% if date %}{{ date }}{% endif %}" + TEMPLATE, "<user>a</><assistant>"),
        # The mark around what an assistant wrote.
        ("{% generation %}{% endgeneration %}" + TEMPLATE, "<user>a</><assistant>"),
    ],
)  # fmt: skip
def test_templates_may_leave_names_open(tmp_path, template, text):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": 2}])
    assert load_prompts([path], byte_tokenizer(template), DataConfig()).prompts[0].text == text


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_the_templates_of_known_models_give_what_they_give_by_themselves(path):
    known = byte_tokenizer(path.read_text(encoding="utf-8"))
    known.bos_token = "<s>"
    messages = [{"role": "user", "content": "1+1?"}]
    template = ChatTemplate(known, DataConfig())
    if path.stem.removesuffix("_training") in ("idefics3", "llava_next", "smolvlm"):  # they take parts, not text
        with pytest.raises(InputError, match="leaves the problem out"):
            template.check(messages)
        return
    template.check(messages)
    assert template.render(messages, "row 0") == known.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


def test_messages_that_the_template_refuses_are_named_by_row(tmp_path, tokenizer):
    messages = [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "fine", "answer": 1}, {"prompt": messages, "answer": 1}])
    with pytest.raises(InputError, match=r"x.jsonl, row 1 \(line 2\).*'tiny-instruct'.*tool, user.*no tools here"):
        load_prompts([path], tokenizer, DataConfig())


def test_no_source_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"`data.train` must be at least one source, got none"):
        load_prompts([], tokenizer, DataConfig())


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not beside this checkout")
def test_every_shared_file_loads_whole(tokenizer):
    files = sorted(SHARED.glob("*/*.parquet"))
    assert files
    for path in files:
        loaded = load_prompts([str(path)], tokenizer, DataConfig(max_prompt_tokens=100_000))
        assert loaded.num_rows == len(loaded.prompts) == pq.read_metadata(path).num_rows
        assert {p.kind for p in loaded.prompts} == {"choice" if path.stem == "commonsense_qa" else "math"}
        assert [p.metadata["extra_info"]["index"] for p in loaded.prompts[:3]] == [0, 1, 2]


# -- the order of prompts ----------------------------------------------------------------------------------------------

sizes = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(sizes, st.integers(0, 3), st.integers(1, 6))
def test_every_epoch_holds_every_prompt_once_whatever_the_batch_size(case, seed, num_epochs):
    num_prompts, size = case
    order = PromptOrder(num_prompts, seed)
    total = num_epochs * num_prompts
    drawn = [i for position in range(0, total + size, size) for i in order.batch(position, size)]
    for epoch in range(num_epochs):
        assert sorted(drawn[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))


@given(sizes, st.integers(0, 3), st.integers(0, 60))
def test_no_batch_holds_a_prompt_twice_wherever_it_begins(case, seed, position):
    num_prompts, size = case
    batch = PromptOrder(num_prompts, seed).batch(position, size)
    assert len(batch) == len(set(batch)) == size


@given(sizes, st.integers(0, 40))
def test_an_order_is_resumed_from_the_position_alone(case, position):
    num_prompts, size = case
    used = PromptOrder(num_prompts, seed=1)
    for earlier in range(0, position, size):
        used.batch(earlier, size)
    assert used.batch(position, size) == PromptOrder(num_prompts, seed=1).batch(position, size)


def test_a_batch_larger_than_the_set_repeats_it_evenly():
    # 3 prompts, 7 draws: every prompt twice and one a third time
    batch = PromptOrder(3, seed=0).batch(0, 7)
    assert sorted(batch.count(i) for i in range(3)) == [2, 2, 3]


def test_epochs_and_seeds_differ_and_the_stream_is_pinned():
    order = PromptOrder(100, seed=0)
    assert order.batch(0, 100) != PromptOrder(100, seed=1).batch(0, 100)
    assert order.batch(0, 10) != order.batch(100, 10)
    # A resumed run on another machine or another version must draw the same prompts.
    assert PromptOrder(10, seed=0).batch(0, 4) == [8, 9, 0, 3]


def test_neighbouring_epochs_are_almost_independent_shuffles():
    # Rank correlation over 200 seeds: 0 for independent shuffles, give or take 0.1 / sqrt(200) = 0.007. Keeping prompts
    # 10 draws apart in epochs of 100 may cost a little of that.
    correlations = []
    for seed in range(200):
        order = PromptOrder(100, seed)
        drawn = np.array([order.batch(position, 10) for position in range(300, 500, 10)]).reshape(2, 100)
        places = drawn.argsort(axis=1)
        correlations.append(np.corrcoef(places)[0, 1])
    assert abs(np.mean(correlations)) < 0.05


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`num_prompts` must be at least 1, got 0"):
        PromptOrder(0, seed=0)
