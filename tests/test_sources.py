"""Sources of every form are read, and what is wrong with one is said by file and row."""

from __future__ import annotations

import json
import time
from datetime import date
from decimal import Decimal
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipo_ds.config import RECIPES
from clipo_ds.sources import Problem, name_sources, read_problems
from clipo_ds.types import InputError


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: str, *, field: str = "data.train") -> list[Problem]:
    return list(read_problems(path, field=field))


def read_row(tmp_path: Path, row: dict) -> Problem:
    return read(write_jsonl(tmp_path / "row.jsonl", [row]))[0]


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """No network, and the datasets cache in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["prompt", "question", "problem"])
@pytest.mark.parametrize("truth", ["ground_truth", "answer", "solution"])
def test_simple_layouts_are_read(tmp_path, problem, truth):
    row = read_row(tmp_path, {problem: "1+1?", truth: "2", "level": 3})
    assert row.messages == [{"role": "user", "content": "1+1?"}]
    assert row.ground_truth == "2"
    assert row.source == "row"
    assert row.metadata == {truth: "2", "level": 3}


def test_of_several_columns_the_first_of_the_documented_order_counts(tmp_path):
    row = read_row(tmp_path, {"problem": "p", "question": "q", "solution": "so 2", "answer": "2"})
    assert (row.messages[0]["content"], row.ground_truth) == ("q", "2")
    row = read_row(tmp_path, {"question": "q", "answer": "3", "reward_model": {"ground_truth": "2"}})
    assert row.ground_truth == "2"


def test_null_columns_count_as_absent(tmp_path):
    row = read_row(
        tmp_path, {"prompt": None, "question": "q", "reward_model": None, "answer": "2", "data_source": None}
    )
    assert (row.messages[0]["content"], row.ground_truth, row.source) == ("q", "2", "row")


def test_the_answer_behind_gsm8k_s_hashes_is_taken(tmp_path):
    answer = "He pays 4 * 3 = <<4*3=12>>12.\nWith 6 more 18.\n#### 1,018 "
    row = read_row(tmp_path, {"question": "q", "answer": answer})
    assert row.ground_truth == "1,018"
    assert row.metadata["answer"] == answer
    # A heading inside reward_model is left alone, and so is a line that only mentions hashes.
    assert read_row(tmp_path, {"question": "q", "reward_model": {"ground_truth": "#### 1"}}).ground_truth == "#### 1"
    assert read_row(tmp_path, {"question": "q", "answer": "a #### 1"}).ground_truth == "a #### 1"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("18", "18"),
        ("0", "0"),
        ("-0.0", "0"),
        ("18.0", "18"),
        ("1.50", "1.5"),
        ("0.00001", "0.00001"),
        ("2.5e-5", "0.000025"),
        ("1e16", "10000000000000000"),
        ("9007199254740993", "9007199254740993"),  # 2**53 + 1 is no float
        ("0.12345678901234567890123", "0.12345678901234567890123"),
        ("12345678901234567.5", "12345678901234567.5"),
    ],
)
def test_a_number_in_json_is_a_ground_truth_of_its_value(tmp_path, number, text):
    path = tmp_path / "x.jsonl"
    path.write_text(
        f'{{"question": "q", "answer": {number}}}\n{{"question": "q", "reward_model": {{"ground_truth": {number}}}}}\n'
    )
    outside, inside = read(str(path))
    assert (outside.ground_truth, inside.ground_truth) == (text, text)
    assert outside.metadata["answer"] == json.loads(number)  # what reward functions get is what the file holds
    assert type(outside.metadata["answer"]) is type(json.loads(number))


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([0.1, 1e-5, 18], pa.float16()), ["0.1", "0.00001", "18"]),
        (pa.array([0.1, 1e-5, 18], pa.float32()), ["0.1", "0.00001", "18"]),
        (pa.array([0.1, 1e-5, 1e22], pa.float64()), ["0.1", "0.00001", "1" + "0" * 22]),
        (pa.array([18, 2**63, 0], pa.uint64()), ["18", str(2**63), "0"]),
        (
            pa.array([Decimal("18.50"), Decimal("0.00"), Decimal("-100.00")], pa.decimal128(10, 2)),
            ["18.5", "0", "-100"],
        ),
        (pa.array([Decimal("1" * 50), Decimal(-1), Decimal(0)], pa.decimal256(76, 0)), ["1" * 50, "-1", "0"]),
        (pa.array(["7", "1e-05", "7"]).dictionary_encode(), ["7", "1e-05", "7"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_number_in_parquet_is_a_ground_truth_of_its_value(tmp_path, column, texts):
    path = tmp_path / "x.parquet"
    inside = pa.StructArray.from_arrays([column], ["ground_truth"])
    for table in ({"question": ["q"] * 3, "answer": column}, {"question": ["q"] * 3, "reward_model": inside}):
        pq.write_table(pa.table(table), path)
        assert [p.ground_truth for p in read(str(path))] == texts


def test_a_dataset_folder_keeps_the_value_of_short_floats(tmp_path, local_hub):
    folder = tmp_path / "one"
    folder.mkdir()
    pq.write_table(pa.table({"question": ["q"], "answer": pa.array([0.1], pa.float32())}), folder / "rows.parquet")
    assert [p.ground_truth for p in read(str(folder))] == ["0.1"]


def test_messages_written_as_json_text_are_read_as_messages(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1?"}]
    assert read_row(tmp_path, {"prompt": json.dumps(messages), "answer": 2}).messages == messages
    # A problem may begin with a bracket.
    for problem in (
        "What does <video> do in HTML?",
        "[1, 2, 3] has which sum?",
        '{"a": 1}',
        "[x] is the floor of x; the user's role?",
    ):
        assert read_row(tmp_path, {"prompt": problem, "answer": 2}).messages[0]["content"] == problem


def test_columns_for_pictures_may_be_there_and_empty(tmp_path):
    row = {"question": "q", "answer": 2, "image": None, "images": [], "video_1": "", "imagery": "rich"}
    row["figure"] = {"bytes": None, "path": None}
    assert read_row(tmp_path, row).ground_truth == "2"


def test_jsonl_may_have_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": 1}\n\n  \n{"question": "b", "answer": 2}')
    assert [p.messages[0]["content"] for p in read(str(path))] == ["a", "b"]
    assert read(str(path))[1].where == f"{path}, row 1 (line 4)"


def test_rows_are_read_one_at_a_time_and_no_more_than_asked(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": 1}, {"broken": 1}])
    assert len(list(read_problems(path, field="data.train", max_rows=1))) == 1
    assert next(read_problems(path, field="data.train")).ground_truth == "1"


# -- malformed rows ----------------------------------------------------------------------------------------------------

GOOD = {"question": "a", "answer": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "answer": 1}, "one of prompt, question, problem must be given, got the columns text, answer"),
        ({}, r"must be given, got the columns \(none\)"),
        ({"question": "  ", "answer": 1}, "`question` must be the problem's text, got '  '"),
        ({"prompt": [], "answer": 1}, r"`prompt` must be a text, or a list of messages .*, got \[\]"),
        ({"prompt": ["hello"], "answer": 1}, "`prompt` must be a text, or a list of messages"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "`prompt` must be a text, or a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": 1}, "the last one the user's"),
        ({"prompt": 7, "answer": 1}, "`prompt` must be a text, or a list of messages .*, got 7"),
        ({"question": "a"}, "one of reward_model.ground_truth, ground_truth, answer, solution must be given"),
        ({"question": "a", "answer": " "}, "`answer` must be a text or a number, got ' '"),
        ({"question": "a", "answer": True}, "`answer` must be a text or a number, got True"),
        ({"question": "a", "answer": float("nan")}, "`answer` must be a text or a number, got nan"),
        ({"question": "a", "answer": float("-inf")}, "`answer` must be a text or a number, got -inf"),
        ({"question": "a", "answer": None}, r"must be given, got the columns question, answer \(null\)"),
        ({"question": "a", "answer": 10**1000}, "`answer` must be a number of at most 1000 digits, got 1000"),
        ({"question": "a", "answer": "\ud835"}, r"`answer` must be Unicode text, got half a character"),
        ({"question": "a\ud835", "answer": 1}, r"`question` must be Unicode text, got half a character"),
        (
            {"prompt": str([{"role": "user", "content": "a"}]), "answer": 1},
            r"`prompt` must be a text or a list of messages, which may be JSON text, got \"\[{'role': 'user'",
        ),
        (
            {"prompt": '[{"from": "human", "value": "a"}]', "answer": 1},
            "`prompt` must be a text, or a list of messages",
        ),
        ({"prompt": '{"role": "user", "content": "a"}', "answer": 1}, "`prompt` must be a text, or a list of messages"),
        ({"question": "<image>\nHow many?", "answer": 1}, "`question` must be text alone, got '<image>' in it"),
        (
            {"prompt": [{"role": "user", "content": "see <|image_1|>"}], "answer": 1},
            r"`prompt` must be text alone, got '<\|image_1\|>' in it",
        ),
        ({"question": "a", "answer": 1, "images": ["a.png"]}, r"must be text alone, got \['a.png'\] in `images`"),
        ({"question": "a", "answer": 1, "video": "a.mp4"}, "must be text alone, got 'a.mp4' in `video`"),
        (
            {"question": "a", "answer": 1, "figure": {"bytes": "iVBO", "path": None}},
            "must be text alone, got .* in `figure`",
        ),
        ({"question": "a", "answer": ["1"]}, "`answer` must be a text or a number"),
        ({"question": "a", "reward_model": "1"}, "`reward_model` must be an object with `ground_truth`, got '1'"),
        (
            {"question": "a", "reward_model": {"style": "rule"}},
            "`reward_model.ground_truth` must be a text or a number",
        ),
    ],
)
def test_a_malformed_row_is_named_by_file_and_row(tmp_path, row, message):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, GOOD, row])
    with pytest.raises(InputError, match=rf"x.jsonl, row 2 \(line 3\): .*{message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_malformed_parquet_row_is_named_by_file_and_row(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{**GOOD, "answer": "1"}] * 1500 + [{"question": "a", "answer": None}]), path)
    with pytest.raises(
        InputError, match=r"x.parquet, row 1500: one of .* must be given, got the columns question, answer"
    ):
        read(str(path))


def test_a_date_is_no_ground_truth(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": ["q"], "answer": pa.array([date(2024, 1, 5)])}), path)
    with pytest.raises(
        InputError, match=r"row 0: `answer` must be a text or a number, got datetime.date\(2024, 1, 5\)"
    ):
        read(str(path))


@pytest.mark.parametrize(
    "line", ['{"answer": ' + "1" * 5000 + "}", '{"answer": ' + "[" * 100_000 + "}", '{"answer": 1e9999999999999999999}']
)
def test_json_that_python_cannot_hold_is_named_by_its_row(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"question": "a", "answer": 1}}\n{line}\n')
    with pytest.raises(
        InputError, match=r"x.jsonl, row 1 \(line 2\): the line must be one JSON object, got: ."
    ) as caught:
        read(str(path))
    assert "\n" not in str(caught.value)


def test_a_line_that_is_no_json_object_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a", "answer": 1}\n{"question": ')
    with pytest.raises(InputError, match=r"row 1 \(line 2\): the line must be one JSON object, got a syntax error"):
        read(str(path))
    path.write_text("[1, 2]\n")
    with pytest.raises(InputError, match=r"row 0 \(line 1\): the line must be one JSON object, got \[1, 2\]"):
        read(str(path))


def test_a_long_value_is_shortened_in_the_message(tmp_path):
    with pytest.raises(InputError) as caught:
        read_row(tmp_path, {"prompt": [["x" * 5000]], "answer": 1})
    assert len(str(caught.value)) < 600


# -- files and other sources -------------------------------------------------------------------------------------------


def test_a_missing_empty_or_unreadable_file_is_named_with_its_setting(tmp_path):
    for name in ("none.parquet", "none.jsonl"):
        with pytest.raises(InputError, match=rf"`data.test` must name a file that exists, got '.*{name}'"):
            read(str(tmp_path / name), field="data.test")
    (tmp_path / "empty.jsonl").touch()
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    for name in ("empty.jsonl", "empty.parquet"):
        with pytest.raises(InputError, match=rf"`data.train` must name data with at least one row, got '.*{name}'"):
            read(str(tmp_path / name))
    (tmp_path / "zero.parquet").touch()
    (tmp_path / "text.parquet").write_text("question,answer\n")
    for name in ("zero.parquet", "text.parquet"):
        with pytest.raises(InputError, match=rf"`data.train` must name a readable parquet file, got '.*{name}': .+"):
            read(str(tmp_path / name))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": 1}\n')
    with pytest.raises(InputError, match=r"`data.train` must name a readable UTF-8 text file, got '.*latin.jsonl'"):
        read(str(tmp_path / "latin.jsonl"))


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 1000), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"must name a readable parquet file, got '.*x.parquet'"):
        read(str(path))


@pytest.mark.parametrize(
    "given", ["data.csv", "rows.json", "rows.jsonl.gz", "word", "a/b/c/d", "org/name/x/y:train", ""]
)
def test_a_source_of_no_known_form_is_refused_with_the_forms(given):
    with pytest.raises(InputError, match=r"`data.train` must be a .parquet or .jsonl file, .*, got '"):
        read(given)


@pytest.mark.parametrize("given", ["~nobody-of-this-name/a.jsonl", "x" * 300 + ".jsonl"])
def test_a_path_that_cannot_be_looked_at_is_refused_in_one_line(given):
    with pytest.raises(InputError, match=r"`data.train` must be a .parquet or .jsonl file, .*, got '.*: .+"):
        read(given)


def test_a_dataset_with_pictures_is_refused_before_they_are_decoded(tmp_path, local_hub):
    folder = tmp_path / "seen"
    folder.mkdir()
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "figure": datasets.Image()}
    )
    rows = {"question": ["q", "q"], "answer": ["1", "2"], "figure": [None, {"bytes": b"no picture", "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    with pytest.raises(InputError, match=r"seen, row 1: the row must be text alone, got .* in `figure`"):
        read(str(folder))
    with pytest.raises(InputError, match=r"rows.parquet, row 1: the row must be text alone, got .* in `figure`"):
        read(str(folder / "rows.parquet"))


def test_every_shipped_data_file_is_whole():
    for path in RECIPES.glob("*.jsonl"):
        problems = read(f"recipes:{path.name}")
        assert len({problem.messages[-1]["content"] for problem in problems}) == len(problems)
        assert problems[0].where == f"recipes:{path.name}, row 0 (line 1)"


def test_a_file_that_is_not_shipped_is_refused_with_those_that_are():
    with pytest.raises(
        InputError, match=r"`data.train` must be `recipes:` and a shipped file \(.*\), got 'recipes:no.jsonl'"
    ):
        read("recipes:no.jsonl")


def test_a_local_dataset_folder_is_read_by_split(tmp_path, local_hub):
    folder = tmp_path / "sums"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([{"question": "1?", "answer": "1"}] * 2), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist([{"question": "2?", "answer": "2"}]), folder / "test.parquet")
    train, test = read(f"{folder}:train"), read(f"{folder}:test")
    assert [p.ground_truth for p in train] == ["1", "1"]
    assert (test[0].messages[0]["content"], test[0].source, test[0].where) == ("2?", "sums", f"{folder}:test, row 0")
    assert len(list(read_problems(f"{folder}:train", field="data.train", max_rows=1))) == 1
    with pytest.raises(
        InputError, match=r"`data.train` must name one split \((train, test|test, train)\), as in '.*sums:t"
    ):
        read(str(folder))
    with pytest.raises(InputError, match=r"got '.*sums:validation': Unknown split"):
        read(f"{folder}:validation")


def test_a_folder_with_one_split_needs_no_name_for_it(tmp_path, local_hub):
    folder = tmp_path / "one"
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", [{"question": "1?", "answer": 1}, {"question": "2?"}])
    with pytest.raises(InputError, match=r"one, row 1: one of reward_model.ground_truth, .* must be given"):
        read(str(folder))
    assert len(list(read_problems(str(folder), field="data.train", max_rows=1))) == 1


def test_a_folder_without_data_is_refused(tmp_path, local_hub):
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match=r"`data.train` must be .*, got '.*void': "):
        read(str(tmp_path / "void"))


def test_a_hub_dataset_that_cannot_be_reached_is_refused_in_one_line(local_hub):
    for given in ("no-such-org/none", "no-such-org/none:train", "no-such-org/none/config:train"):
        with pytest.raises(InputError, match=rf"`data.train` must be .*, got '{given}': .+") as caught:
            read(given)
        assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_said_at_once(local_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(InputError, match=r"got 'org/none:train': not a folder, and the Hub cannot be reached \(.+\)"):
        read("org/none:train")
    assert time.monotonic() - began < 10  # the library's own requests are repeated for 25 s


def test_sources_get_short_names_that_are_never_shared():
    names = name_sources(["recipes:easy_sums_test.jsonl", "a/gsm8k.parquet", "b/gsm8k.parquet", "org/math:test"])
    assert names == {
        "easy_sums_test": "recipes:easy_sums_test.jsonl",
        "a/gsm8k.parquet": "a/gsm8k.parquet",
        "b/gsm8k.parquet": "b/gsm8k.parquet",
        "math:test": "org/math:test",
    }
