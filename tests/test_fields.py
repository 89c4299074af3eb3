"""The field table behind `--help`, error messages and the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipo_ds.fields import (
    README_MARKERS,
    build_parser,
    describe,
    fields_markdown,
    fields_of,
    known_fields,
    main,
    nearest,
    readme_table,
)
from clipo_ds.schema import RewardFunction
from clipo_ds.types import InputError

README = Path(__file__).parents[1] / "README.md"


def test_every_field_of_the_schema_has_a_docstring() -> None:
    everything = [*known_fields().values(), *fields_of(RewardFunction)]
    assert [field.path for field in everything if not field.doc] == []
    assert all(field.doc.endswith(".") for field in everything)


def test_sections_come_before_their_fields_and_nest() -> None:
    paths = list(known_fields())
    assert paths.index("model") < paths.index("model.lora") < paths.index("model.lora.rank")
    assert known_fields()["model.lora"].optional
    assert not known_fields()["model"].optional
    assert known_fields()["task.flaws"].section is not None
    assert known_fields()["reward.functions"].section is None


def test_defaults_are_written_as_yaml() -> None:
    texts = {path: field.default_text for path, field in known_fields().items()}
    assert texts["contrastive"] == "on"
    assert texts["task"] == "null"
    assert texts["optimizer.betas"] == "[0.9, 0.999]"
    assert texts["model.gradient_checkpointing"] == "true"
    assert texts["optimizer.learning_rate"] == "1e-06"
    assert [field.default_text for field in fields_of(RewardFunction)] == ["required", "1.0"]


def test_every_type_of_the_schema_can_be_described() -> None:
    for field in known_fields().values():
        if field.section is None:
            assert describe(field.hint)
    assert describe(known_fields()["reward.functions"].hint) == "a list of {function, weight}"
    assert describe(known_fields()["optimizer.betas"].hint) == "a list of 2 numbers"
    assert describe(known_fields()["model.lora.target_modules"].hint) == "text or a list of texts"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("contrastive.temprature", "contrastive.temperature"),  # a letter is missing
        ("contrastve.temperature", "contrastive.temperature"),  # the section is misspelt
        ("contrastve", "contrastive"),
        ("group_size", "rollout.group_size"),  # the section is missing
        ("rollout.learning_rate", "optimizer.learning_rate"),  # the wrong section
        ("ds-config", "ds_config"),
        ("objective.kl_coef", "objective.kl_coefficient"),
        ("stpes", "steps"),
    ],
)
def test_the_nearest_field_is_the_one_meant(wrong: str, right: str) -> None:
    assert nearest(wrong, known_fields()) == right


def test_nothing_is_nearest_to_a_word_unlike_all() -> None:
    assert nearest("rollout.xyzzy", known_fields()) is None
    assert nearest("anything", []) is None


def test_help_lists_every_field_with_docstring_choices_and_default() -> None:
    text = " ".join(build_parser(["demo"]).format_help().split())
    for field in known_fields().values():
        if field.section is None or field.optional:
            assert f"--{field.path} " in text
        if field.path != "recipe":
            assert field.doc in text
    assert "--recipe NAME What to train: demo, or a YAML file. (required)" in text
    assert "--contrastive.head {linear,mlp,none}" in text
    assert "--contrastive null" in text
    assert "(a number; default: 0.05)" in text


def test_markdown_lists_every_field_once() -> None:
    lines = fields_markdown().splitlines()
    for path, field in known_fields().items():
        rows = [line for line in lines if line.startswith(f"| `{path}` |")]
        heads = [line for line in lines if line == f"### `{path}`"]
        assert (len(rows), len(heads)) == ((1, 0) if field.section is None else (0, 1))
    # Every row of a table has its four cells.
    assert {line.count("|") for line in lines if line.startswith("|")} == {5}


def test_the_readme_holds_the_table_of_fields() -> None:
    if not README.exists():
        pytest.skip("there is no README.md beside the package")
    _, between, _ = readme_table(README.read_text(encoding="utf-8"))
    assert between.strip() == fields_markdown().strip(), "run `python -m clipo_ds.fields README.md`"


def test_renewing_the_table_leaves_the_rest_of_the_readme_alone(tmp_path: Path) -> None:
    start, end = README_MARKERS
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{start}\nold\n{end}\n\nThe end.\n", encoding="utf-8")
    main([str(readme)])
    assert readme.read_text(encoding="utf-8") == f"# Title\n\n{start}\n{fields_markdown()}{end}\n\nThe end.\n"


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(InputError, match="must hold the markers"):
        readme_table("# Title\n")
