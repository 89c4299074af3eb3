"""Whatever a user gets wrong ends before a weight is loaded: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT, SMALL, run

from clipo_ds.cli import compare_main, evaluate_main, export_main, train_main
from clipo_ds.records import open_run

SERVED = ["--rollout.engine=vllm_server", "--rollout.server.urls=http://127.0.0.1:1"]
CPU = f"--ds_config={ROOT}/ds_configs/zero3_cpu.json"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A folder with a small model and tokenizer, with a chat template; made here, no weights but random ones."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    config = transformers.LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=256, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def fails(capsys, tmp_path, arguments, *needles: str) -> None:
    """The line names everything in `needles`, and no run folder appears."""
    before = sorted(tmp_path.rglob("*"))
    code = train_main(arguments)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2, line
    assert line.startswith("error: ")
    for needle in needles:
        assert needle in line, line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--contrastive.temprature=0.1"], ["contrastive.temprature", "contrastive.temperature"]),
        (["--contrastiv.temperature=0.1"], ["contrastiv", "contrastive"]),
        (["--contrastive.temperature=0"], ["contrastive.temperature", "positive", "0"]),
        (["--contrastive.loss=infonse"], ["contrastive.loss", "infonce", "infonse"]),
        (["--rollout.group_size=1"], ["rollout.group_size", "at least 2", "1"]),
        (["--rollout.group_size=many"], ["rollout.group_size", "many"]),
        (["--optimizer.mini_batches=3"], ["optimizer.mini_batches", "divisor", "3"]),
        (["--optimizer.max_tokens_per_micro_batch=8"], ["optimizer.max_tokens_per_micro_batch", "8"]),
        (["--sampling.top_p=0.9"], ["sampling", "0.9"]),
        (["--rollout.engine=vllm_server"], ["rollout.server.urls", "at least one"]),
        (["--rollout.server.urls=http://127.0.0.1:1"], ["rollout.engine", "vllm_server", "transformers"]),
        ([*SERVED, "--rollout.server.urls=127.0.0.1:8000"], ["rollout.server.urls", "http://HOST:PORT"]),
        (SERVED, ["rollout.server.urls", "http://127.0.0.1:1", "scripts/serve.py"]),
        ([*SERVED, "--rollout.server.sync_timeout_s=0"], ["rollout.server.sync_timeout_s", "positive"]),
        (["--rollout.async_steps=1"], ["rollout.async_steps", "vllm_server"]),
        ([*SERVED, "--rollout.async_steps=2"], ["rollout.async_steps", "0 or 1"]),
        (
            [*SERVED, "--rollout.async_steps=1", "--objective.importance_cap=null"],
            ["objective.importance_cap", "rollout.async_steps"],
        ),
        (["--optimizer.learning_rate=.inf"], ["optimizer.learning_rate", "finite", "inf"]),
        (["--objective.clip_high=.inf"], ["objective.clip_high", "finite", "inf"]),
        (["--contrastive.temperature=.inf"], ["contrastive.temperature", "finite", "inf"]),
        (["--optimizer.betas=[0.9, .inf]"], ["optimizer.betas", "inf"]),
        (["--seed=4294967296"], ["seed", "2**32"]),
        (["--contrastive.freeze_head=true", "--contrastive.head_warmup_steps=1"], ["head_warmup_steps", "freeze_head"]),
        (
            ["--objective.name=dapo", "--rollout.group_size=1", "--contrastive=null"],
            ["rollout.group_size", "at least 2", "dynamic sampling"],
        ),
        (["--evaluation.max_new_tokens=99999"], ["evaluation.max_new_tokens", "context"]),
        (["--contrastive.head=linear", f"--contrastive.head_path={ROOT}"], ["contrastive.head_path", str(ROOT)]),
        (
            ["--contrastive.head=linear", f"--contrastive.head_path={ROOT}/README.md"],
            ["contrastive.head_path", "README.md", "header"],
        ),
        (["--model.lora.target_modules=banana"], ["model.lora.target_modules", "banana"]),
        (["--model.lora.target_modules=[q_proj, banana]"], ["model.lora.target_modules", "'banana', which is none"]),
        (["--model.lora.target_modules=[q_proj, lm_head]"], ["model.lora.target_modules", "output head", "lm_head"]),
        (["--model.lora.target_modules=[embed_tokens]"], ["model.lora.target_modules", "linear", "embed_tokens"]),
        (["--model.attn_implementation=banana"], ["model.attn_implementation", "banana"]),
        (["--objective.name=ppo"], ["objective.name", "grpo", "ppo"]),
        (["--ds_config=nowhere.json"], ["ds_config", "nowhere.json"]),
        (["--recipe=demmo"], ["demmo", "demo"]),
        (["--resume=nowhere"], ["resume", "nowhere"]),
        (["--contrastive.head=linear", "--contrastive.head_path=nowhere"], ["contrastive.head_path", "nowhere"]),
        (["--rollout.parity.max_abs=0"], ["rollout.parity.max_abs", "positive", "0"]),
        (["--rollout.stop=['']"], ["rollout.stop", "not empty"]),
        (["--rollout.stop=['<pad>=']"], ["rollout.stop", "single tokens", "'<pad>='"]),
        (["--rollout.engine=vlm"], ["rollout.engine", "vllm", "vlm"]),
        (["--rollout.vllm.memory_share=1.5"], ["rollout.vllm.memory_share", "1.5"]),
        (["--rollout.engine=vllm", "--rollout.vllm.max_model_len=40"], ["rollout.vllm.max_model_len", "64", "40"]),
        (["--rollout.engine=vllm", "--rollout.vllm.lora=adapter"], ["rollout.vllm.lora", "merged", "model.lora"]),
        (["--logging.trackers=[nobody]"], ["logging.trackers", "nobody"]),
        (["--reward.functions=[{function: 'nowhere.py:f'}]"], ["reward.functions", "nowhere.py"]),
        (["--reward.functions={function: 'asyncio:sleep'}"], ["reward.functions", "asyncio:sleep", "an async one"]),
        (["--reward.correct=1e39"], ["reward.correct", "1e+30", "1e+39"]),
        (["--reward.wrong=-1e39"], ["reward.wrong", "1e+30", "-1e+39"]),
        (["--contrastive.bonus=1e39"], ["contrastive.bonus", "1e+30", "1e+39"]),
        (["--rollout.parity.p999_abs=-1"], ["rollout.parity.p999_abs", "positive", "-1"]),
        (["--reward.functions={function: 'textwrap:wrap'}"], ["reward.functions", "textwrap:wrap", "'text'", "lack"]),
    ],
)
def test_wrong_settings(capsys, tmp_path, monkeypatch, arguments, needles):
    monkeypatch.chdir(tmp_path)
    fails(capsys, tmp_path, [*SMALL, CPU, *arguments], *needles)


@pytest.mark.parametrize(
    ("content", "needles"),
    [
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}}, ["stage3_max_live_parameters"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"devise": "cpu"}}}, ["offload_param.devise"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, ["reduce_bucket_size", "big"]),
        ({"zero_optimisation": {"stage": 3}}, ["zero_optimisation", "zero_optimization"]),
    ],
)
def test_what_deepspeed_does_not_know_is_named_with_its_file(capsys, tmp_path, monkeypatch, content, needles):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    fails(capsys, tmp_path, [*SMALL, f"--ds_config={path}"], "mine.json", *needles)


def test_existing_run_folder_is_left_alone(capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    fails(capsys, tmp_path, [*SMALL, CPU, f"--run_dir={folder}"], "run_dir", str(folder), "resume")


def on_data(model: Path, *data: Path) -> list[str]:
    return [
        "--recipe=smollm2_cpu", CPU, f"--model.path={model}", f"--data.train=[{','.join(map(str, data))}]",
        "--data.test=[]",
        "--data.max_prompt_tokens=64", "--rollout.max_new_tokens=16",
    ]  # fmt: skip


def test_missing_empty_and_malformed_data(capsys, tmp_path, small_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {"prompt": "1+1", "answer": "2"}
    empty = rows(tmp_path / "empty.jsonl")
    malformed = rows(tmp_path / "malformed.jsonl", good, {"prompt": "3+3"})
    broken = rows(tmp_path / "broken.jsonl", good, good, "{not json")
    fails(capsys, tmp_path, on_data(small_model, tmp_path / "absent.parquet"), "data", "absent.parquet")
    fails(capsys, tmp_path, on_data(small_model, empty), "empty.jsonl")
    fails(capsys, tmp_path, on_data(small_model, malformed), "malformed.jsonl", "1")
    fails(capsys, tmp_path, on_data(small_model, broken), "broken.jsonl", "2")


def test_other_training_data_are_refused_or_allowed_and_recorded(capsys, tmp_path, small_model):
    problems = [{"prompt": f"{n}+{n}", "answer": str(2 * n)} for n in range(9)]
    data, test = rows(tmp_path / "sums.jsonl", *problems), rows(tmp_path / "test.jsonl", *problems[:2])
    folder = tmp_path / "run"
    settings = [
        *on_data(small_model, data), f"--data.test={test}", "--rollout.prompts_per_step=2", "--rollout.group_size=2",
        "--evaluation.every=null", "--contrastive=null", "--model.lora=null", "--steps=1", f"--run_dir={folder}",
    ]  # fmt: skip
    assert train_main(settings) == 0
    go_on = ["--resume=auto", f"--run_dir={folder}", "--steps=2"]
    before = sorted(folder.rglob("*"))
    wrong = {"answer": "5", "prompt": "4+4"}
    for changed, words in (
        (problems[1:], "9 prompts then, 8 now (from sums)"),
        (problems[::-1], "9 prompts, but not the same ones in the same order (from sums)"),
        ([*problems[:4], wrong, *problems[5:]], "9 prompts, but not the same ones in the same order (from sums)"),
    ):
        rows(data, *changed)
        assert train_main(go_on) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line == (
            "error: `data.train` must hold the problems that step_000001 was trained on, in the same order, got others "
            f"in {data}: {words}; put them back, or go on with these by --data.allow_changed true"
        )
        assert sorted(folder.rglob("*")) == before
    rows(test, *problems[2:5])
    assert train_main([*go_on, "--data.allow_changed=true"]) == 0
    said = capsys.readouterr().err
    assert "warning: `data.train` has changed since step_000001: 9 prompts, but not" in said
    assert "warning: test set test has changed since step_000001: 2 prompts then, 3 now (from test); its" in said
    run = open_run(folder)
    first, second = run.starts()
    assert first["data"]["train"]["digest"] != second["data"]["train"]["digest"]
    assert len(second["changed_data"]) == 2 and "changed_data" not in first
    assert run.config["data"]["allow_changed"] is False
    # From here on these are the run's data.
    assert train_main([*go_on[:2], "--steps=3"]) == 0
    assert "changed" not in capsys.readouterr().err


def test_wrong_models(capsys, tmp_path, small_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = rows(tmp_path / "data.jsonl", *[{"prompt": "1+1", "answer": "2"}] * 8)
    silent = tmp_path / "no_template"
    shutil.copytree(small_model, silent)
    for file in ("chat_template.jinja",):
        (silent / file).unlink()
    narrow = tmp_path / "narrow"
    shutil.copytree(small_model, narrow)
    config = json.loads((narrow / "config.json").read_text()) | {"vocab_size": 50}
    (narrow / "config.json").write_text(json.dumps(config))
    fails(capsys, tmp_path, on_data(tmp_path / "absent_model", data), "model.path", "absent_model")
    fails(capsys, tmp_path, on_data(silent, data), "chat template", "no_template")
    fails(capsys, tmp_path, on_data(narrow, data), "model.path", "vocab", "50")
    long = ["--rollout.max_new_tokens=10000", "--optimizer.max_tokens_per_micro_batch=20000"]
    fails(capsys, tmp_path, [*on_data(small_model, data), *long], "rollout.max_new_tokens", "256")


@pytest.mark.vllm
def test_what_vllm_cannot_do(capsys, tmp_path, small_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vllm = [*SMALL, CPU, "--rollout.engine=vllm"]
    fails(
        capsys, tmp_path, [*vllm, "--rollout.vllm.tensor_parallel=2"], "rollout.vllm.tensor_parallel", "ranks (1)", "2"
    )
    fails(capsys, tmp_path, [*vllm, "--rollout.vllm.kv_cache_gb=1e-5"], "rollout.vllm.kv_cache_gb", "max_model_len")
    long = ["--evaluation.max_new_tokens=80", "--rollout.vllm.max_model_len=64"]
    fails(capsys, tmp_path, [*vllm, *long], "rollout.vllm.max_model_len", "80 new ones", "64")
    data = rows(tmp_path / "data.jsonl", *[{"prompt": "1+1", "answer": "2"}] * 8)
    narrow = [*on_data(small_model, data), "--rollout.engine=vllm"]
    fails(capsys, tmp_path, narrow, "rollout.engine", "transformers", "heads of size", "16")
    strange = tmp_path / "strange"
    shutil.copytree(small_model, strange)
    config = json.loads((strange / "config.json").read_text()) | {"architectures": ["HomemadeForCausalLM"]}
    (strange / "config.json").write_text(json.dumps(config))
    fails(capsys, tmp_path, [*on_data(strange, data), "--rollout.engine=vllm"], "rollout.engine", "HomemadeForCausalLM")


def test_vllm_that_is_not_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    fails(capsys, tmp_path, [*SMALL, CPU, "--rollout.engine=vllm"], "rollout.engine", "not installed", "make setup")


def test_evaluate_and_export_name_what_is_wrong(capsys, tmp_path, small_model):
    data = rows(tmp_path / "data.jsonl", {"prompt": "1+1", "answer": "2"})
    for main, arguments, needle in [
        (evaluate_main, ["--model", str(tmp_path / "absent"), "--data", str(data)], "absent"),
        (evaluate_main, ["--model", str(small_model), "--data", str(tmp_path / "absent.parquet")], "absent.parquet"),
        (evaluate_main, ["--model", str(small_model)], "data"),
        (evaluate_main, ["--model", str(small_model), "--data", str(data), "--output", "no/where.json"], "output"),
        (evaluate_main, ["--model", str(small_model), "--data", str(data), "--samples", "0"], "samples"),
        (export_main, [str(tmp_path / "absent"), str(tmp_path / "out")], "absent"),
    ]:
        assert main(arguments) == 2
        assert needle in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compare_takes_no_run_of_other_settings_for_its_own(capsys, tmp_path):
    from clipo_ds.compare import _is_begun, arm_config
    from clipo_ds.config import dump_config, load_config

    folder = tmp_path / "grpo-seed0"
    folder.mkdir()
    arguments = [*SMALL, CPU, "--evaluation.every=2", "--arms=grpo", f"--out={tmp_path}"]
    config = arm_config(load_config("demo", [*SMALL[1:], CPU, "--evaluation.every=2", "--steps=7"]), "grpo", 0, folder)
    (folder / "config.yaml").write_text(dump_config(config))
    assert compare_main([*arguments, "--steps=8"]) == 2
    assert "other settings" in capsys.readouterr().err
    auto = replace(config, rollout=replace(config.rollout, engine="auto"))  # the run's own says what that was
    assert _is_begun(auto)
    assert compare_main([*arguments, "--arms=ppo"]) == 2
    assert "ppo" in capsys.readouterr().err
    assert compare_main([*arguments, "--evaluation.every=null"]) == 2
    assert "evaluation.every" in capsys.readouterr().err


def test_a_comparison_that_is_refused_leaves_no_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert compare_main([*SMALL, CPU, "--evaluation.every=2", "--arms=ppo"]) == 2
    assert "ppo" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


def test_the_launcher_passes_the_exit_code_and_one_line_on(tmp_path):
    done = run("train.py", *SMALL, CPU, "--contrastive.temprature=0.1", ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


def test_a_taken_port_is_one_line_that_names_the_launchers_flag(capsys, tmp_path, monkeypatch):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (alone | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        fails(capsys, tmp_path, [*SMALL, CPU], "`--master_port` must be a free port of 127.0.0.1", str(port))


def test_what_one_rank_alone_finds_ends_all_ranks_with_its_line(tmp_path, small_model, monkeypatch):
    for rank in (0, 1):
        (tmp_path / f"rank{rank}").mkdir()
    rows(tmp_path / "rank0" / "data.jsonl", *[{"prompt": "1+1", "answer": "2"}] * 8)
    monkeypatch.setenv("FOLDER_OF_RANKS", str(tmp_path))
    arguments = [
        *on_data(small_model, Path("data.jsonl")), "--rollout.prompts_per_step=4", f"--run_dir={tmp_path}/run"
    ]  # fmt: skip
    done = run("../tests/other_folder.py", *arguments, ranks=2)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "data.jsonl" in line and "(on rank 1, node1)" in line
    assert not (tmp_path / "run").exists()
