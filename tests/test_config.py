"""Recipes and flags become a checked configuration, or one clear line."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clipo_ds.config import dump_config, load_config, shipped_recipes, split_train_arguments
from clipo_ds.schema import (
    LARGEST_REWARD,
    ContrastiveConfig,
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RewardFunction,
    TrainConfig,
)
from clipo_ds.types import InputError


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ what can be said


def test_flags_may_be_joined_split_or_bare() -> None:
    config = load_config("demo", ["--steps=7", "--rollout.group_size", "4", "contrastive.temperature=0.3"])
    assert (config.steps, config.rollout.group_size) == (7, 4)
    assert config.contrastive is not None
    assert config.contrastive.temperature == 0.3
    assert load_config("demo", "--steps 7 --data.instruction 'two words'").data.instruction == "two words"


def test_the_last_flag_wins() -> None:
    assert load_config("demo", ["--seed", "1", "--seed", "2"]).seed == 2


def test_a_recipe_says_only_what_differs_from_the_schema(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "steps: 3\ntask: {}\n"))
    path = str(tmp_path / "mine.yaml")
    assert config == dataclasses.replace(config, steps=3, recipe=path)
    assert (config.optimizer, config.contrastive) == (OptimizerConfig(), ContrastiveConfig())


def test_a_recipe_may_use_dotted_names(tmp_path: Path) -> None:
    path = write(tmp_path, "task: {}\ncontrastive.temperature: 0.1\nrollout.group_size: 3\n")
    config = load_config(path)
    assert config.rollout.group_size == 3
    assert config.contrastive == ContrastiveConfig(temperature=0.1)


def test_vllm_sleeps_and_a_replica_of_transformers_stays_unless_one_field_says_otherwise() -> None:
    assert not load_config("demo").sampler_sleeps
    assert load_config("demo", ["--rollout.sleep=true"]).sampler_sleeps
    assert load_config("demo", ["--rollout.engine=vllm"]).sampler_sleeps
    assert not load_config("demo", ["--rollout.engine=vllm", "--rollout.sleep=false"]).sampler_sleeps


def test_null_switches_an_optional_section_off() -> None:
    assert load_config("demo", ["--contrastive", "null"]).contrastive is None
    assert load_config("smollm2_cpu", ["--model.lora", "null"]).model.lora is None
    # The order of flags is the order in which they are said.
    assert load_config("demo", ["--contrastive.temperature", "1", "--contrastive", "null"]).contrastive is None


def test_a_field_switches_its_section_on_with_defaults() -> None:
    assert load_config("demo", ["--model.lora.rank", "8"]).model.lora == LoraConfig(rank=8)
    # What the recipe said about the section went with the null.
    config = load_config("demo", ["--contrastive", "null", "--contrastive.temperature", "0.1"])
    assert config.contrastive == ContrastiveConfig(temperature=0.1)


def test_a_field_switches_on_a_section_that_the_recipe_has_null(tmp_path: Path) -> None:
    path = write(tmp_path, "task: {}\ncontrastive: null\n")
    assert load_config(path).contrastive is None
    assert load_config(path, ["contrastive.weight=0.1"]).contrastive == ContrastiveConfig(weight=0.1)
    assert load_config(path, ["--contrastive", "{}"]).contrastive == ContrastiveConfig()


def test_a_section_as_one_flag_lies_over_the_recipe() -> None:
    base, config = load_config("demo"), load_config("demo", ["--task.flaws", "{slip: 0.2, skip: 0.1}"])
    assert base.task is not None
    assert config.task is not None
    assert config.task.flaws == dataclasses.replace(base.task.flaws, slip=0.2, skip=0.1)


def test_lists_are_yaml_and_one_value_is_a_list_of_one(tmp_path: Path) -> None:
    model = ["--model.path", "m", "--task", "null"]
    assert load_config("demo", [*model, "--data.train", "[a.parquet, b.parquet]"]).data.train == [
        "a.parquet",
        "b.parquet",
    ]
    assert load_config("demo", [*model, "--data.train", "a.parquet"]).data.train == ["a.parquet"]
    assert load_config("demo", [*model, "--data.train", "org/name:split"]).data.train == ["org/name:split"]
    path = write(tmp_path, "model: {path: m}\ndata:\n  train: a.parquet\n")
    assert load_config(path).data.train == ["a.parquet"]
    assert load_config("demo", ["--optimizer.betas", "[0.9, 0.95]"]).optimizer.betas == (0.9, 0.95)


def test_names_and_values_are_a_mapping(tmp_path: Path) -> None:
    wanted = {"enable_thinking": False, "date": "26 Jul 2024"}
    flag = "{enable_thinking: false, date: 26 Jul 2024}"
    assert load_config("demo", ["--data.template_arguments", flag]).data.template_arguments == wanted
    text = "task: {}\ndata:\n  template_arguments:\n    enable_thinking: false\n    date: 26 Jul 2024\n"
    recipe = write(tmp_path, text)
    assert load_config(recipe).data.template_arguments == wanted
    # A flag takes the place of the recipe's names, as with every other field.
    assert load_config(recipe, ["--data.template_arguments={}"]).data.template_arguments == {}


def test_reward_functions_are_a_list_of_sections(tmp_path: Path) -> None:
    wanted = [RewardFunction("a.b:f", 0.5), RewardFunction("g.py:h")]
    path = write(
        tmp_path, "task: {}\nreward:\n  functions:\n  - {function: 'a.b:f', weight: 0.5}\n  - function: g.py:h\n"
    )
    assert load_config(path).reward.functions == wanted
    flag = "[{function: a.b:f, weight: 0.5}, {function: g.py:h}]"
    assert load_config("demo", ["--reward.functions", flag]).reward.functions == wanted
    assert load_config("demo", ["--reward.functions", "{function: g.py:h}"]).reward.functions == wanted[1:]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E5", 1e5), ("3", 3.0), (".5", 0.5), ("2.", 2.0), ("+1.5e+0", 1.5), (".inf", math.inf)],
)
def test_numbers_are_read_as_numbers(text: str, value: float, tmp_path: Path) -> None:
    # PyYAML follows YAML 1.1, for which 1e-6 (no dot) is text.
    from_file = load_config(write(tmp_path, f"task: {{}}\noptimizer: {{max_grad_norm: {text}}}\n"))
    from_flag = load_config("demo", [f"--optimizer.max_grad_norm={text}"])
    for config in (from_file, from_flag):
        assert config.optimizer.max_grad_norm == value
        assert isinstance(config.optimizer.max_grad_norm, float)


def test_a_negative_number_is_a_value_and_not_a_flag() -> None:
    config = load_config("demo", ["--contrastive.floor", "-0.25"])
    assert config.contrastive is not None
    assert config.contrastive.floor == -0.25


@pytest.mark.parametrize("text", ["yes", "010", "12:30", "2024-01-01", "1_000", "0x1f"])
def test_words_that_yaml_1_1_turns_into_something_else_stay_text(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"task: {{}}\nlogging: {{project: {text}}}\nrun_dir: {text}\n")
    assert load_config(path).logging.project == text
    assert load_config(path).run_dir == text


@pytest.mark.parametrize(
    "text", ["Answer: yes", "# 1 first", "{x}", "12", "true", "a\nb", "it's", "- no", "1e-6", "x=y"]
)
def test_free_text_in_a_flag_is_taken_as_it_stands(text: str) -> None:
    assert load_config("demo", ["--data.instruction", text]).data.instruction == text
    assert load_config("demo", [f"--data.instruction={text}"]).data.instruction == text


def test_quotes_say_that_null_is_text() -> None:
    assert load_config("demo", ["--data.instruction", "null"]).data.instruction is None
    assert load_config("demo", ["--data.instruction", "'null'"]).data.instruction == "null"
    assert load_config("demo", ["--data.instruction", ""]).data.instruction == ""


def test_the_recipe_is_recorded_unless_the_file_names_another(tmp_path: Path) -> None:
    assert load_config("demo").recipe == "demo"
    path = write(tmp_path, dump_config(load_config("demo")))
    assert load_config(path).recipe == "demo"
    assert load_config(write(tmp_path, "task: {}\n")).recipe == str(path)


# ------------------------------------------------------------------------------------------------ round trip

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
NUMBER = st.floats(min_value=1e-300, allow_infinity=False)
REWARD = st.floats(-LARGEST_REWARD, LARGEST_REWARD)


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    base = load_config(draw(st.sampled_from(shipped_recipes())))
    lora = st.builds(LoraConfig, rank=st.integers(1, 9999), target_modules=st.one_of(TEXT, st.lists(TEXT)))
    functions = st.lists(st.builds(RewardFunction, function=TEXT, weight=FINITE), max_size=3)
    return dataclasses.replace(
        base,
        seed=draw(st.integers(0, 2**32 - 1)),
        model=dataclasses.replace(base.model, lora=draw(st.none() | lora)),
        data=DataConfig(
            train=draw(st.lists(TEXT, min_size=1)) if base.task is None else [],
            instruction=draw(st.none() | TEXT),
            template_arguments=draw(st.dictionaries(TEXT, st.none() | st.booleans() | FINITE | TEXT, max_size=2)),
            max_prompt_tokens=base.data.max_prompt_tokens,
        ),
        reward=RewardConfig(wrong=-abs(draw(REWARD)), functions=draw(functions)),
        contrastive=draw(st.none() | st.builds(ContrastiveConfig, temperature=NUMBER, bonus=REWARD)),
        objective=ObjectiveConfig(clip_low=draw(st.none() | NUMBER), dynamic_sampling=draw(st.none() | st.booleans())),
        optimizer=dataclasses.replace(
            base.optimizer, learning_rate=draw(NUMBER), betas=(draw(st.floats(0, 0.99)), 0.5)
        ),
        recipe=draw(st.none() | TEXT),
        run_dir=draw(st.none() | TEXT),
    )


@given(config=configs())
@settings(max_examples=50, deadline=None)
def test_a_dumped_configuration_loads_as_an_equal_one(config: TrainConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert load_config(write(Path(folder), dump_config(config))) == config


@given(text=TEXT)
@settings(max_examples=50, deadline=None)
def test_dumped_text_reads_the_same_in_a_plain_yaml_reader(text: str) -> None:
    # A notebook may read config.yaml with PyYAML itself.
    config = dataclasses.replace(load_config("demo"), run_dir=text)
    assert yaml.safe_load(dump_config(config))["run_dir"] == text


# ------------------------------------------------------------------------------------------------ what is refused

BAD_FLAGS = [
    ("--contrastive.temprature=1", "`contrastive.temprature` is not a field; did you mean `contrastive.temperature`?"),
    ("--contrastive={temprature: 1}", "`contrastive.temprature` is not a field; did you mean `contrastive.temp"),
    ("--model.lora.rnk=1", "`model.lora.rnk` is not a field; did you mean `model.lora.rank`?"),
    ("--group_size=4", "`group_size` is not a field; did you mean `rollout.group_size`?"),
    ("--steps.x=1", "`steps.x` is not a field"),
    ("--rollout.group_size=many", "`rollout.group_size` must be an integer, got 'many'"),
    ("--rollout.group_size=2.5", "`rollout.group_size` must be an integer, got 2.5"),
    ("--rollout.group_size=1e2", "`rollout.group_size` must be an integer, got 100.0"),
    ("--rollout.group_size=true", "`rollout.group_size` must be an integer, got true"),
    ("--rollout.group_size=null", "`rollout.group_size` must be an integer, got null"),
    ("--rollout.group_size=", "`rollout.group_size` must be an integer, got ''"),
    ("--optimizer.learning_rate=1e-x", "`optimizer.learning_rate` must be a number, got '1e-x'"),
    ("--optimizer.learning_rate=true", "`optimizer.learning_rate` must be a number, got true"),
    ("--optimizer.learning_rate=.nan", "`optimizer.learning_rate` must be a finite number, got nan"),
    ("--model.trust_remote_code=1", "`model.trust_remote_code` must be true or false, got 1"),
    ("--model.trust_remote_code=yes", "`model.trust_remote_code` must be true or false, got 'yes'"),
    ("--objective.name=grp", "`objective.name` must be one of grpo, dr_grpo, dapo, gspo, gmpo, got 'grp'"),
    ("--objective.aggregation=mean", "must be one of sequence_mean, token_mean, constant or null, got 'mean'"),
    ("--optimizer.betas=[0.9]", "`optimizer.betas` must be a list of 2 numbers, got [0.9]"),
    ("--optimizer.betas=[0.9, x]", "`optimizer.betas` must be a list of 2 numbers, got [0.9, x]"),
    ("--data.train=[1]", "`data.train` must be a list of texts, got [1]"),
    ("--data.train=null", "`data.train` must be a list of texts, got null"),
    (
        "--reward.functions=[{functon: a}]",
        "`reward.functions[0].functon` is not a field; did you mean `reward.functions",
    ),
    ("--reward.functions=[{weight: 1}]", "`reward.functions[0].function` must be given"),
    ("--reward.functions=[{function: a, weight: x}]", "`reward.functions[0].weight` must be a number, got 'x'"),
    ("--reward.functions=f", "`reward.functions` must be a list of {function, weight}, got 'f'"),
    ("--reward.functions=[{function: a, function: b}]", "`function` must be given once, got it twice"),
    ("--data.template_arguments=no", "`data.template_arguments` must be {name: value, …}, got 'no'"),
    ("--data.template_arguments.a=1", "is not a field; give `data.template_arguments` as {name: value, …}"),
    ("--data.template_arguments={1: no}", "`data.template_arguments` must be {name: value, …}, got {1: no}"),
    ("--data.template_arguments={a: 1, a: 2}", "`a` must be given once, got it twice"),
    ("--contrastive=3", "`contrastive` must be a section (contrastive.…) or null, got 3"),
    ("--model=null", "`model` must be a section (model.…), got null"),
    ("--contrastive={temperature: 1", "not YAML: while parsing a flow mapping"),
    ("--steps=0", "`steps` must be at least 1, got 0"),
    ("--rollout.group_size=1", "`rollout.group_size` must be at least 2 for contrastive.level group"),
    ("--optimizer.mini_batches=3", "`optimizer.mini_batches` must be a divisor of rollout.prompts_per_step (8), got 3"),
    ("--sampling.top_p=0.9", "`sampling` must be temperature 1, top_p 1, top_k 0 for unbiased ratios"),
    ("--recipe=demo", "`recipe` must be given once"),
]


@pytest.mark.parametrize(("flag", "message"), BAD_FLAGS, ids=[flag for flag, _ in BAD_FLAGS])
def test_a_bad_flag_ends_in_one_line_that_names_recipe_flag_and_field(flag: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        load_config("demo", [flag])
    text = str(raised.value)
    assert text.startswith(f"recipe demo, flag {flag.partition('=')[0]}: ")
    assert message in text
    assert "\n" not in text


BAD_FILES = [
    (
        "steps: 3\nrollout:\n  group_sise: 3\n",
        "line 3: `rollout.group_sise` is not a field; did you mean `rollout.group_",
    ),
    ("contrastve: {temperature: 1}\n", "line 1: `contrastve` is not a field; did you mean `contrastive`?"),
    ("task:\n  flaws:\n    slipp: 0.1\n", "line 3: `task.flaws.slipp` is not a field; did you mean `task.flaws.slip`?"),
    ("steps: 1\nsteps: 2\n", "line 2: `steps` must be given once, got it twice"),
    ("contrastive:\n  bonus: 1\ncontrastive.bonus: 2\n", "line 3: `contrastive.bonus` must be given once"),
    ("steps: [\n", "line 2, column 1: not YAML"),
    ("seed: 1\n  steps: 2\n", "line 2, column 8: not YAML: mapping values are not allowed here"),
    ("steps: 1\n---\nsteps: 2\n", "not YAML: expected a single document"),
    ("steps: !!python/object:x 1\n", "line 1: not YAML: could not determine a constructor"),
    ("steps: \x01\n", "not YAML: unacceptable character"),
    ("- steps\n", "`recipe` must hold fields like `steps: 100`, got '- steps'"),
    ("seed: 1\nsteps: many\n", "line 2: `steps` must be an integer, got 'many'"),
    ("run_dir: 12\n", "line 1: `run_dir` must be text or null, got 12"),
    ("<<: {steps: 1}\n", "line 1: `<<` is not a field"),
    ("? [a]\n: 1\n", "line 1: `?` is not a field"),
    # A range error points to the line of the field that was set, though the other one of the two is named first.
    ("steps: 1\nreward:\n  wrong: 2\n", "line 3: `reward.correct` must be above reward.wrong, got 1.0"),
    ("model:\n  path: m\n", "`data.train` must be at least one file or dataset id, got []"),
    ("", "`task` must be given when model.path is arithmetic"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[repr(text) for text, _ in BAD_FILES])
def test_a_bad_recipe_ends_in_one_line_that_names_file_line_and_field(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as raised:
        load_config(path)
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_recipe_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one of demo, .*smollm2_cpu.*, got 'dmo'; did you mean `demo`\?"):
        load_config("dmo")
    with pytest.raises(InputError, match="or an existing YAML file, got"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="or an existing YAML file, got"):
        load_config(tmp_path)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"steps: \xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize("arguments", [["seed"], ["--data.train", "a", "b"], ["-seed=1"], ["=1"]])
def test_what_is_not_a_flag_is_refused(arguments: list[str]) -> None:
    with pytest.raises(InputError, match="`overrides` must be --field VALUE or --field=VALUE"):
        load_config("demo", arguments)


@pytest.mark.parametrize("arguments", [["--seed"], ["--seed", "--steps=1"]])
def test_a_flag_without_a_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(InputError, match="`seed` must be followed by a value"):
        load_config("demo", arguments)


# ------------------------------------------------------------------------------------------------ the command line


def test_the_recipe_is_taken_out_of_the_arguments_and_the_launchers_rank_dropped() -> None:
    arguments = ["--local_rank=1", "--ds_config", "z.json", "--recipe", "demo", "--contrastive", "null", "--seed=3"]
    recipe, overrides = split_train_arguments(arguments)
    config = load_config(recipe, overrides)
    assert (recipe, config.ds_config, config.seed, config.contrastive) == ("demo", "z.json", 3, None)


@pytest.mark.parametrize("arguments", [[], ["--seed", "1"], ["--recipe", "demo", "--recipe", "demo"]])
def test_a_command_line_needs_one_recipe(arguments: list[str]) -> None:
    with pytest.raises(InputError, match="`recipe` must be one of demo, "):
        split_train_arguments(arguments)


def test_help_and_errors_come_without_torch() -> None:
    # torch and deepspeed take seconds to import; a typo should not have to wait for them.
    program = (
        "import sys\n"
        "from clipo_ds.config import load_config, split_train_arguments\n"
        "load_config('demo')\n"
        "try:\n"
        "    split_train_arguments(['--help'])\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 0\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'jsonargparse'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--contrastive.temperature" in done.stdout
    assert "smollm2_cpu" in done.stdout
