"""What a run that goes on takes from its folder, from the command line, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from launching import ROOT, SMALL

from clipo_ds.checkpoint import check_resumable
from clipo_ds.cli import train_main
from clipo_ds.config import dump_config, load_config, split_train_arguments
from clipo_ds.fields import known_fields
from clipo_ds.resuming import MAY_CHANGE, check_settings, differences, find_run_folder
from clipo_ds.run_folder import RunFolder
from clipo_ds.types import InputError

CPU = f"--ds_config={ROOT}/ds_configs/zero3_cpu.json"
FILES = [
    "trainer.pt", "head.safetensors", "rng_rank_0.pt", "engine/state/zero_pp_rank_0_mp_rank_00_model_states.pt",
    "engine/state/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
]  # fmt: skip


def begun(folder: Path, *overrides: str) -> Path:
    """A run folder after two steps, as far as checks look into it; gives its checkpoint."""
    checkpoint = folder / "checkpoints" / "step_000002"
    for name in FILES:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).touch()
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 2, "world_size": 1, "zero_stage": 3}))
    config = load_config("demo", [*SMALL[1:], CPU, *overrides])
    (folder / "config.yaml").write_text(dump_config(config))
    return checkpoint


def resumed(*arguments: str):
    return load_config(*split_train_arguments(arguments))


@pytest.mark.parametrize("recipe", [[], ["--recipe=demo"]])
def test_what_is_not_given_again_is_as_in_the_run(tmp_path, recipe):
    begun(tmp_path, "--seed=7", "--steps=5", "--contrastive.temperature=0.3")
    config = resumed(*recipe, "--resume=auto", f"--run_dir={tmp_path}", "--steps=9")
    assert config.contrastive is not None
    assert (config.seed, config.steps, config.contrastive.temperature) == (7, 9, 0.3)
    assert config.rollout.group_size == 8
    check_settings(config, tmp_path, None)


def test_a_checkpoint_names_the_run_wherever_its_folder_is_now(tmp_path):
    checkpoint = begun(tmp_path / "moved", "--run_dir=elsewhere")
    assert Path(str(resumed(f"--resume={checkpoint}").run_dir)) == tmp_path / "moved"


def test_another_recipe_is_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(InputError, match=r"`recipe` must be that of the run in .* to resume it \(demo\), got smollm2_"):
        split_train_arguments(["--recipe=smollm2_cpu", "--resume=auto", f"--run_dir={tmp_path}"])
    # A run's own file stands for the recipe it was made from.
    split_train_arguments([f"--recipe={tmp_path}/config.yaml", "--resume=auto", f"--run_dir={tmp_path}"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--optimizer.learning_rate=0.01", r"`optimizer.learning_rate` must stay \S+, got 0.01"),
        ("--seed=7", "`seed` must stay 0, got 7"),
        ("--contrastive=null", "`contrastive` must stay on, got null"),
        ("--contrastive.head=mlp", "`contrastive.head` must stay none, got mlp"),
        ("--model.lora.rank=4", "`model.lora` must stay null, got on"),
        ("--task.hidden_size=32", "`task.hidden_size` must stay 64, got 32"),
        ("--rollout.prompts_per_step=2", "`rollout.prompts_per_step` must stay 4, got 2"),
    ],
)
def test_another_setting_is_refused_before_anything_is_loaded_or_written(capsys, tmp_path, flag, message):
    checkpoint = begun(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train_main(["--resume=auto", f"--run_dir={tmp_path}", "--steps=9", flag]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, line), line
    assert line.endswith(f"the run in {tmp_path} goes on with its own settings; to change them, start a new run from "
                         f"--model.path {checkpoint}/model")  # fmt: skip
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_all_that_differs_is_named_with_the_way_out(tmp_path):
    data = tmp_path / "a.jsonl"
    arguments = ["--model.path=org/model", "--task=null", f"--data.train={data}"]
    checkpoint = begun(tmp_path, *arguments)
    config = resumed("--resume=auto", f"--run_dir={tmp_path}", "--seed=3", "--objective.name=gspo")
    with pytest.raises(InputError) as caught:
        check_settings(config, tmp_path, checkpoint)
    line = str(caught.value)
    assert "`seed` must stay 0, got 3; `objective.name` must stay" in line
    assert line.endswith(f"start a new run from --model.path {checkpoint}/model")


def test_every_setting_that_may_change_is_a_field_and_passes(tmp_path):
    assert set(MAY_CHANGE) <= set(known_fields())
    begun(tmp_path)
    config = resumed(
        "--resume=auto", f"--run_dir={tmp_path}", "--steps=9", "--evaluation.every=3", "--checkpoint.keep=1",
        "--logging.show_every=null", "--rollout.engine=vllm_server", "--rollout.server.urls=http://127.0.0.1:1",
        "--rollout.vllm.eager=true", "--optimizer.max_tokens_per_micro_batch=9999",
    )  # fmt: skip
    assert len(list(differences(load_config(tmp_path / "config.yaml"), config))) == 10  # with resume and run_dir
    check_settings(config, tmp_path, None)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_of_a_checkpoint_is_named(tmp_path, name):
    checkpoint = begun(tmp_path)
    check_resumable(checkpoint, 1, 3, steps=2, with_term=True)
    (checkpoint / name).unlink()
    with pytest.raises(InputError, match=r"`resume` must be a whole checkpoint, got '.*' without "):
        check_resumable(checkpoint, 1, 3, steps=2, with_term=True)


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"`steps` must be at least the 2 of .*, got 1"):
        check_resumable(begun(tmp_path), 1, 3, steps=1, with_term=True)


def test_a_folder_that_is_no_run_is_not_resumed(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert train_main([*SMALL, CPU, "--resume=auto", f"--run_dir={tmp_path}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "`run_dir` must be the folder of a run, or a new or empty one" in line
    assert "--resume auto" not in line


def test_a_checkpoint_outside_a_run_folder_is_not_resumed(capsys, tmp_path):
    checkpoint = begun(tmp_path)
    (tmp_path / "config.yaml").unlink()
    assert train_main([*SMALL, CPU, f"--resume={checkpoint}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "`resume` must be a checkpoint inside its run folder" in line
    assert f"--model.path {checkpoint}/model" in line


def test_differences_name_a_section_that_appears_once() -> None:
    config = load_config("demo")
    other = dataclasses.replace(config, contrastive=None, seed=1)
    assert [name for name, *_ in differences(config, other)] == ["seed", "contrastive"]


def test_runs_without_a_folder_of_their_own_get_one_each(tmp_path, monkeypatch, ranks):
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", SMALL[1:])
    found, _ = find_run_folder(config, "demo-20261128-081500")  # both start in that second
    taken = [RunFolder.take(config, found, None, ranks) for _ in range(2)]
    assert [str(folder.path) for folder in taken] == ["runs/demo-20261128-081500", "runs/demo-20261128-081500-2"]
    for folder in taken:
        folder.release()
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_in_which_another_run_has_begun_since_it_was_found_is_not_taken(tmp_path, ranks):
    config = load_config("demo", [*SMALL[1:], f"--run_dir={tmp_path}/run", "--resume=auto"])
    found = find_run_folder(config, "any")
    assert found == (tmp_path / "run", None)
    begun(tmp_path / "run")
    with pytest.raises(InputError, match="into which one has written since this start; start again"):
        RunFolder.take(config, *found, ranks)
    assert not (tmp_path / "run" / "lock.json").exists()
