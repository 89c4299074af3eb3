"""The program as its users start it: launcher, ranks, run folder, resume, stop, export, evaluate."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from launching import LAUNCHER, ROOT, SMALL, comparable, ds_config, free_port, metrics, run, start, train
from safetensors.torch import load_file

from clipo_ds import distributed, parts, trainer
from clipo_ds.cli import train_main
from clipo_ds.config import load_config
from clipo_ds.records import open_run

CPU = "--ds_config=ds_configs/zero3_cpu.json"
COLUMNS = [
    "step", "group", "prompt", "response", "ground_truth", "extracted", "correct", "process_consistent", "reward",
    "contrastive_loss", "contrastive_reward", "advantage", "num_tokens", "truncated", "embedding",
]  # fmt: skip


def assert_same(left: dict[str, float], right: dict[str, float], relative: float) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        # What sampler and trainer differ by is rounding, and nothing else.
        absolute = 2e-5 if key.startswith("mismatch/") else 2e-6
        assert right[key] == pytest.approx(value, rel=relative, abs=absolute), key


# Everything that a resumed run has to bring back: schedule, optimisers of policy and head, position in the data.
RICH = [
    *SMALL, CPU, "--steps=4", "--checkpoint.every=2", "--optimizer.schedule=linear", "--optimizer.mini_batches=2",
    "--contrastive.head=linear", "--contrastive.head_output_size=16", "--contrastive.head_warmup_steps=1",
    "--objective.kl_coefficient=0.01", "--objective.importance_cap=2", "--logging.trackers=[tensorboard]",
    "--rollout.engine=auto",
]  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Four steps in one plain process, a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("one_rank") / "run"
    train(*RICH, f"--run_dir={folder}")
    return folder


def test_run_folder_holds_what_the_design_says(one_rank):
    found = open_run(one_rank)
    assert [row["step"] for row in found.metrics()] == [1, 2, 3, 4]
    assert load_config(one_rank / "config.yaml").rollout.engine == "transformers"  # what `auto` was
    assert {"config.yaml", "ds_config.json", "environment.jsonl", "metrics.jsonl", "rollouts", "checkpoints"} <= {
        path.name for path in one_rank.iterdir()
    }
    table = pq.read_table(one_rank / "rollouts" / "step_000001.parquet")
    assert table.num_rows == 4 * 8
    for column in COLUMNS:
        assert column in table.column_names
    assert json.loads((one_rank / "checkpoints" / "step_000004" / "checkpoint.json").read_text())["step"] == 4


def test_sampler_and_trainer_are_the_same_model_at_every_step(one_rank):
    assert all(row["mismatch/max_abs"] < 1e-3 for row in metrics(one_rank))


@pytest.mark.slow
def test_first_step_does_not_depend_on_ranks_micro_batches_or_zero_stage(tmp_path):
    runs = {
        "reference": (1, [CPU]),
        "two ranks": (2, [CPU]),
        "small micro-batches": (1, [CPU, "--optimizer.max_tokens_per_micro_batch=64"]),
        "ZeRO-0": (1, ["--ds_config=" + ds_config(tmp_path, 0)]),
        "two ranks, ZeRO-2": (2, ["--ds_config=" + ds_config(tmp_path, 2)]),
    }
    first = {}
    for name, (ranks, arguments) in runs.items():
        folder = tmp_path / name.replace(" ", "_")
        # One optimiser step a batch: all but the small micro-batches may go on from the scoring pass's graph.
        arguments = [*SMALL, *arguments, "--steps=2", "--optimizer.mini_batches=1"]
        train(*arguments, f"--run_dir={folder}", ranks=ranks)
        first[name] = [comparable(row) for row in metrics(folder)]
    for name in runs:
        assert_same(first["reference"][0], first[name][0], 1e-4)
        # The second step has felt one update: the gradients agreed as well.
        assert_same(first["reference"][1], first[name][1], 1e-2)


def test_policy_is_frozen_while_the_head_warms_up(one_rank):
    first, second = metrics(one_rank)[:2]
    assert "policy/grad_norm" not in first
    assert "policy/grad_norm" in second
    assert first["contrastive/head_grad_norm"] > 0
    assert first["contrastive/head_norm"] != second["contrastive/head_norm"]


def test_trackers_get_the_metrics(one_rank):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next((one_rank / "trackers").rglob("events.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    seen = [event.value for event in events.Scalars("reward/mean")]
    assert seen == pytest.approx([row["reward/mean"] for row in metrics(one_rank)], rel=1e-6)


def test_resumed_run_equals_the_uninterrupted_one(one_rank, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(one_rank, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    # No recipe: the run folder says what ran. Its own `run_dir` is that of the run it was copied from.
    said = train(f"--run_dir={folder}", "--resume=auto").stderr
    (aside,) = (folder / "superseded").iterdir()
    assert f"going on after step 2: 2 files of rollouts, 2 rows of metrics of later steps moved to {aside}\n" in said
    assert [comparable(row) for row in metrics(aside)] == [comparable(row) for row in metrics(one_rank)[2:]]
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]
    for left, right in zip(metrics(one_rank), metrics(folder), strict=True):
        assert_same(comparable(left), comparable(right), 1e-6)
    for name in ("model/model.safetensors", "head.safetensors"):
        left = load_file(one_rank / "checkpoints" / "step_000004" / name)
        right = load_file(folder / "checkpoints" / "step_000004" / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_longer_course_is_followed_from_the_resumed_step_on_and_config_yaml_says_it(one_rank, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(one_rank, folder)
    train("--recipe=demo", f"--resume={folder}/checkpoints/step_000004", "--steps=6", "--checkpoint.keep=1")
    config = open_run(folder).config
    # Head warm-up takes the first step, the others make two updates each: 6 of them in 4 steps, 10 in 6.
    peak = config["optimizer"]["learning_rate"]
    rates = [row.get("policy/learning_rate") for row in metrics(folder)]
    assert rates[1:] == pytest.approx([peak * left for left in (4 / 6, 2 / 6, 0, 2 / 10, 0)])
    assert (config["steps"], config["checkpoint"]["keep"], config["resume"]) == (6, 1, None)
    assert config["run_dir"] == str(folder)
    assert [(start["step"], start["world_size"]) for start in open_run(folder).starts()] == [(0, 1), (4, 1)]


def test_resume_with_another_contrastive_section_is_refused_before_anything_is_loaded(one_rank):
    done = run("train.py", *RICH, "--contrastive=null", f"--run_dir={one_rank}", "--resume=auto")
    assert done.returncode == 2
    assert "`contrastive` must stay on, got null" in done.stderr


def test_a_new_run_of_the_task_starts_from_the_weights_of_a_checkpoint(one_rank, tmp_path):
    checkpoint = one_rank / "checkpoints" / "step_000004"
    train(*RICH, "--steps=1", "--contrastive=null", f"--model.path={checkpoint}/model", f"--run_dir={tmp_path}/run")
    (first,) = metrics(tmp_path / "run")
    assert first["mismatch/max_abs"] < 1e-4
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (
        checkpoint, tmp_path / "run" / "checkpoints" / "step_000001"
    )]  # fmt: skip
    changed = max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0])
    assert 0 < changed < 0.01  # one step away


def wait_for(file: Path, process: subprocess.Popen[str], lines: int = 0) -> None:
    deadline = time.monotonic() + 300
    while not file.exists() or (lines and len(file.read_text().splitlines()) < lines):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)


def test_a_run_has_its_folder_alone_and_gives_it_up_when_killed_or_stopped(tmp_path, capsys):
    folder = tmp_path / "run"
    settings = [*SMALL, f"--ds_config={ROOT}/ds_configs/zero3_cpu.json", f"--run_dir={folder}", "--steps=10000"]
    process = start("train.py", *settings, "--checkpoint.every=3")
    # While it loads its model, and when it has begun.
    for file, lines, resume in (("lock.json", 1, []), ("metrics.jsonl", 4, ["--resume=auto"])):
        wait_for(folder / file, process, lines)
        assert train_main([*settings, *resume]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "`run_dir` must be a folder that no other run writes into" in line
        assert f"process {process.pid} on " in line
    assert [row["step"] for row in metrics(folder)][:4] == [1, 2, 3, 4]
    process.kill()
    process.communicate()
    saved = max(open_run(folder).checkpoints())
    (folder / "checkpoints" / ".step_999999.partial").mkdir()  # as if it was killed while it saved
    killed, process = process.pid, start("train.py", "--resume=auto", f"--run_dir={folder}")
    wait_for(folder / "superseded", process)  # the step that is whole is not yet saved again
    wait_for(folder / "metrics.jsonl", process, saved + 1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err[-3000:]
    assert f"run folder {folder} is taken over from process {killed} on " in err
    last = metrics(folder)[-1]["step"]
    assert [row["step"] for row in metrics(folder)] == list(range(1, last + 1))
    assert f"stopped after step {last} of 10000" in err
    assert (folder / "checkpoints" / f"step_{last:06d}" / "checkpoint.json").exists()
    assert not list((folder / "checkpoints").glob(".*"))
    assert not (folder / "lock.json").exists()


def test_a_start_that_fails_leaves_both_courses(one_rank, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(one_rank, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def no_sampler(*_: object) -> None:
        raise ConnectionError("no sampler")

    monkeypatch.setattr(parts, "_build_engine", no_sampler)
    with pytest.raises(ConnectionError, match="no sampler"):
        trainer.train(
            load_config(
                folder / "config.yaml", [f"--resume={folder}/checkpoints/step_000002", "--run_dir=" + str(folder)]
            )
        )
    distributed.stop()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_has_no_room_is_not_begun(one_rank, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(one_rank, folder)
    # The next one is taken to be as large as the last, and of this one nearly all is a hole.
    with (folder / "checkpoints" / "step_000004" / "large").open("wb") as file:
        file.truncate(2 * shutil.disk_usage(folder).free)
    assert train_main(["--resume=auto", f"--run_dir={folder}", "--steps=5"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    size = r"[\d.]+ [kMGT]B"
    assert re.fullmatch(
        rf"error: '{folder}/checkpoints/step_000005' was not written for want of room: {size} free, and a checkpoint "
        rf"takes about {size}; the checkpoint of step 4 is whole; make room, then go on with --resume auto --run_dir "
        rf"{folder}", line,
    ), line  # fmt: skip
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_ends_in_one_line(one_rank, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(one_rank, folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Stands for the disk: more than rollouts take, less than the optimiser's state.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        assert train_main(["--resume=auto", f"--run_dir={folder}", "--steps=5"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(
        rf"error: '{folder}/checkpoints/\.step_000005\.partial/engine/\S+\.pt' could not be written: ", line
    )
    assert "the checkpoint of step 4 is whole; make room, then go on with --resume auto" in line
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


def test_exported_model_and_evaluation_agree_with_plain_transformers(one_rank, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    done = run("export.py", str(one_rank), str(out))
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    trained = load_file(one_rank / "checkpoints" / "step_000004" / "model" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in trained.items())
    assert tokenizer.eos_token_id is not None
    figures = tmp_path / "figures.json"
    done = run("evaluate.py", f"--model={one_rank}", "--max_new_tokens=32", f"--output={figures}")
    assert done.returncode == 0, done.stderr
    scored = {row["data"]: row for row in json.loads(figures.read_text())}
    assert set(scored) == {"arithmetic", "arithmetic_harder"}
    recorded = {row["data"]: row["file"] for row in open_run(one_rank).separate_evaluations()}
    for data, row in scored.items():
        responses = open_run(one_rank).separate_responses(recorded[data])
        assert len(responses) == row["num_problems"]
        assert sum(responses["correct"].to_pylist()) == round(row["accuracy"] * row["num_problems"])


@pytest.mark.slow
def test_lora_run_exports_an_adapter_and_the_same_merged_model(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    lora = ["--model.lora.rank=4", "--optimizer.learning_rate=1e-2"]
    train(*SMALL, CPU, "--steps=2", *lora, f"--run_dir={folder}", ranks=2)
    assert metrics(folder)[-1]["mismatch/max_abs"] < 1e-3
    assert run("export.py", str(folder), str(tmp_path / "merged")).returncode == 0
    assert run("export.py", str(folder), str(tmp_path / "adapter"), "--adapter").returncode == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(3, 13)[None]
    untrained = plain(tokens).logits
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")(tokens).logits
    assert torch.allclose(merged(tokens).logits, adapted, atol=1e-4)
    assert not torch.allclose(untrained, adapted, atol=1e-3)


@pytest.mark.slow
def test_two_launchers_on_one_host_make_one_run(tmp_path):
    """As on two nodes: one launcher a node, told its rank, without ssh."""
    import os

    folder, port = tmp_path / "run", free_port()
    hosts = tmp_path / "hostfile"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launchers = [
        subprocess.Popen(
            [
                str(LAUNCHER), "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node),
                "--master_addr", "127.0.0.1", "--master_port", str(port),
                str(ROOT / "scripts" / "train.py"), *SMALL, CPU, "--steps=1", f"--run_dir={folder}",
            ],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [launcher.communicate(timeout=600)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert open_run(folder).environment["world_size"] == 2
    assert not (folder / "lock.json").exists()


@pytest.mark.slow
def test_every_objective_trains_with_and_without_the_contrastive_term(tmp_path):
    objectives = ["grpo", "dr_grpo", "dapo", "gspo", "gmpo"]
    arms = [f"{name}{term}" for name in objectives for term in ("", "+clipo")] + ["grpo+placebo"]
    settings = [*SMALL, CPU, "--steps=2", "--evaluation.every=2", "--optimizer.mini_batches=2"]
    done = run("compare.py", *settings, f"--arms={','.join(arms)}", "--seeds=3", f"--out={tmp_path}", ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    compared = json.loads((tmp_path / "comparison.json").read_text())
    assert {(row["arm"], row["data"]) for row in compared} == {
        (arm, data) for arm in arms for data in ("arithmetic", "arithmetic_harder")
    }
    losses = {}
    for arm in arms:
        rows = metrics(tmp_path / f"{arm}-seed3")
        assert len(rows) == 2
        assert ("contrastive/loss" in rows[0]) == ("+" in arm)
        losses[arm] = rows[1]["policy/grad_norm"]
    # the arms are not one and the same program
    assert len({round(value, 7) for value in losses.values()}) >= len(arms) - 1
    # what is whole is not trained again; an evaluation that a run was cut off before is made
    before = (tmp_path / "grpo-seed3" / "metrics.jsonl").read_text()
    file = tmp_path / "grpo-seed3" / "evaluations.jsonl"
    evaluated = file.read_text().splitlines()
    file.write_text("".join(line + "\n" for line in evaluated[:-1]))
    assert run("compare.py", *settings, "--arms=grpo", "--seeds=3", f"--out={tmp_path}").returncode == 0
    assert (tmp_path / "grpo-seed3" / "metrics.jsonl").read_text() == before
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["data"]) for row in again] == [
        (row["step"], row["data"]) for row in map(json.loads, evaluated)
    ]
