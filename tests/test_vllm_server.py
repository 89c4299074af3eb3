"""Sampling from real vLLM servers on the CPU: exact log-probabilities after syncs, errors by name, deaths, overlap."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from launching import ROOT, SMALL, free_port, metrics, start, train
from serving import Detour, Server, files_left
from small_policy import make_policy
from stops import assert_stops_at

from clipo_ds.batching import collate, flatten_groups
from clipo_ds.cli import serve_main, train_main
from clipo_ds.config import load_config
from clipo_ds.models import load_causal_lm, materialise_model, stop_token_ids
from clipo_ds.records import open_run
from clipo_ds.schema import LoraConfig
from clipo_ds.types import Prompt, SamplerLost
from clipo_ds.vllm_client import ServerClient
from clipo_ds.vllm_server import VllmServerEngine
from clipo_ds.vllm_transfer import FileTransfer
from clipo_ds.warm_start import build_tokenizer
from clipo_ds.weight_sync import sync_weights

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
]

CPU = "--ds_config=ds_configs/zero3_cpu.json"
PROMPTS = [Prompt(uid, "", (4 + uid % 5, 12, 3, 12, 5, 13), "0", "test") for uid in range(6)]


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[list[Server]]:
    """Two servers of the small arithmetic model, on their way."""
    materialise_model("arithmetic", task=load_config("demo", SMALL[1:]).task)
    folder = tmp_path_factory.mktemp("servers")
    # So few tokens a forward that prompts have to wait: in parts, they would kill a CPU server (see serve.CPU_FLAGS).
    few = ["--max-num-batched-tokens=64", "--max-num-seqs=16"]
    started = [Server(folder / f"{number}.log", *SMALL, *few) for number in range(2)]
    try:
        yield started
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def servers(started) -> list[Server]:
    """The two, running, also after a test that kills them."""
    for server in started:
        server.revive()
    for server in started:
        server.wait()
    return started


@pytest.fixture
def server(started) -> Server:
    """The first of them alone."""
    started[0].revive()
    started[0].wait()
    return started[0]


@pytest.fixture(scope="module")
def folder() -> str:
    return materialise_model("arithmetic", task=load_config("demo", SMALL[1:]).task)


def make_engine(ranks, *urls: str, request_timeout_s: float = 60.0, **options) -> VllmServerEngine:
    tokenizer = build_tokenizer()
    clients = [ServerClient(url, request_timeout_s) for url in urls]
    return VllmServerEngine(
        clients, tokenizer, stop_token_ids(tokenizer, None), ranks, FileTransfer(), max_sequences=64, **options
    )


def plain_weights(folder: str) -> list[tuple[str, torch.Tensor]]:
    model = load_causal_lm(folder, dtype="float32")
    return [(name, parameter.detach()) for name, parameter in model.named_parameters(remove_duplicate=False)]


def sampled(engine: VllmServerEngine, *, seed: int = 7, group_size: int = 4, prompts=PROMPTS):
    return engine.generate(prompts, group_size, max_new_tokens=16, seed=seed)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_logprobs_are_the_trainers_after_every_update(servers, ranks, folder, lora):
    engine = make_engine(ranks, *[server.url for server in servers])
    policy = make_policy(folder, ranks, stage=3, lora=lora)
    seen = []
    for _ in range(3):
        sync_weights(policy.model, engine)
        flat = flatten_groups(sampled(engine))
        batch = collate(flat, [[row] for row in range(len(flat))], pad_token_id=0)
        scores = policy.score(batch)
        for row, (_, rollout) in enumerate(flat):
            trainers = scores.logprobs[row, : len(rollout.token_ids)]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), trainers, atol=1e-4, rtol=0)
        seen.append(scores.logprobs.sum().item())
        policy.backward(-policy.forward(batch).logprobs.sum() / 10, last=True)
        policy.step()
    assert len(set(seen)) == 3  # the updates changed something
    assert list(files_left()) == []


def test_same_seed_gives_the_same_rollouts_however_they_are_asked_for(servers, ranks, folder):
    one, two = (make_engine(ranks, *urls) for urls in ([servers[0].url], [server.url for server in servers]))
    two.load_weights(iter(plain_weights(folder)))
    first = sampled(two)
    one.load_weights(iter(plain_weights(folder)))
    assert sampled(one) == first
    assert sampled(one, prompts=PROMPTS[::-1]) == first[::-1]
    assert [group.rollouts[:4] for group in sampled(one, group_size=6)] == [group.rollouts for group in first]
    assert sampled(one, seed=8) != first
    assert len({rollout.token_ids for rollout in first[0].rollouts}) > 1
    for rollout in (rollout for group in first for rollout in group.rollouts):
        assert rollout.truncated == (rollout.token_ids[-1] != one.tokenizer.eos_token_id)
        assert rollout.text == one.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)


def test_a_stop_text_ends_a_response_where_it_is_complete(server, ranks, folder):
    free, stopped = make_engine(ranks, server.url), make_engine(ranks, server.url, stop_texts=["=1"])
    free.load_weights(iter(plain_weights(folder)))
    stopped._version = free._version
    assert_stops_at("=1", sampled(stopped, group_size=8), sampled(free, group_size=8), free.tokenizer, 1e-5)


def test_weights_in_many_small_pieces_are_the_same_weights(servers, ranks, folder, monkeypatch):
    engine = make_engine(ranks, servers[0].url)
    engine.load_weights(iter(plain_weights(folder)))
    expected = sampled(engine)
    monkeypatch.setattr("clipo_ds.vllm_transfer.PIECE_BYTES", 1)
    engine.load_weights((name, tensor + 0.01) for name, tensor in plain_weights(folder))
    assert sampled(engine) != expected
    engine.load_weights(iter(plain_weights(folder)))
    assert sampled(engine) == expected


def test_a_failed_sync_gives_the_servers_own_words_and_the_next_one_heals(servers, ranks, folder):
    url, weights = servers[0].url, plain_weights(folder)
    engine = make_engine(ranks, url)
    engine.load_weights(iter(weights))
    before = sampled(engine)
    tied = [(name, tensor) for name, tensor in weights if name == "lm_head.weight"]  # of the model's own it is none
    narrow = [(name, tensor[:1] if "q_proj" in name else tensor) for name, tensor in weights]
    for broken, words in (
        (narrow, "exceeds dimension size"),
        (weights[:5], "11 weights were left out"),
        (tied, "left out"),
    ):
        taken = iter(broken)
        with pytest.raises(SamplerLost, match=f"{url} .*{words}"):
            make_engine(ranks, url).load_weights(taken)
        assert next(taken, None) is None  # other ranks gather to the end
        assert list(files_left()) == []
    ServerClient(url, 10).call("start_weight_update", timeout_s=10)  # a trainer that was killed in an update
    engine = make_engine(ranks, url)
    engine.load_weights(iter(weights))
    assert sampled(engine) == before


def test_weights_of_another_run_are_noticed(servers, ranks, folder):
    engine, other = make_engine(ranks, servers[0].url), make_engine(ranks, servers[0].url)
    engine.load_weights(iter(plain_weights(folder)))
    other.load_weights(iter(plain_weights(folder)))
    with pytest.raises(SamplerLost, match="does another run use it"):
        sampled(engine)


def test_prompts_of_a_server_that_dies_go_to_the_others_or_end_the_run(servers, ranks, folder):
    engine = make_engine(ranks, servers[1].url)
    engine.load_weights(iter(plain_weights(folder)))
    expected = sampled(engine)
    for on_death in ("continue", "stop"):
        detour = Detour(servers[1])
        threading.Thread(target=lambda way=detour: (wait_for(lambda: way.num_connections >= 2), way.cut())).start()
        engine = make_engine(ranks, detour.url, servers[1].url, on_death=on_death)
        if on_death == "continue":
            assert sampled(engine) == expected
            assert [client.url for client in engine.living] == [servers[1].url]
        else:
            with pytest.raises(SamplerLost, match=f"vLLM server {detour.url} does not answer"):
                sampled(engine)


def test_a_server_that_does_not_answer_in_time_is_reported(servers, ranks, folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SamplerLost, match=f"{url} did not answer /v1/completions within 1 s"):
            sampled(make_engine(ranks, url, request_timeout_s=1.0))
        taken = iter(plain_weights(folder))
        with pytest.raises(SamplerLost, match=f"{url} did not answer /start_weight_update within 1 s"):
            make_engine(ranks, url, sync_timeout_s=1.0).load_weights(taken)
        assert next(taken, None) is None


def test_wrong_servers_end_a_run_before_it_starts(servers, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url, absent = servers[0].url, f"http://127.0.0.1:{free_port()}"
    absolute = f"--ds_config={ROOT}/ds_configs/zero3_cpu.json"
    for address, arguments, needles in [
        (absent, [], ["rollout.server.urls", absent, "Connection refused", "scripts/serve.py"]),
        (url, ["--task.num_layers=3"], ["rollout.server.urls", url, "num_hidden_layers 3", "num_hidden_layers 2"]),
        (url, ["--rollout.max_new_tokens=40"], ["rollout.max_new_tokens", url, "--max-model-len 64", "72"]),
        (url, ["--rollout.dtype=bfloat16"], ["rollout.dtype", "float32", "bfloat16"]),
    ]:
        given = ["--rollout.engine=vllm_server", f"--rollout.server.urls={address}", *arguments]
        assert train_main([*SMALL, absolute, *given]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        for needle in needles:
            assert needle in line, line
    assert list(tmp_path.iterdir()) == []
    assert serve_main([*SMALL, f"--port={servers[0].port}"]) == 2
    assert f"`--port` must be a free port of 127.0.0.1, got {servers[0].port}" in capsys.readouterr().err


@pytest.mark.parametrize("async_steps", [0, 1])
def test_a_run_trains_on_what_servers_sample(servers, tmp_path, async_steps):
    run = tmp_path / "run"
    urls = ",".join(server.url for server in servers)
    train(
        *SMALL, CPU, "--steps=4", "--evaluation.every=2", f"--run_dir={run}", "--rollout.engine=vllm_server",
        f"--rollout.server.urls=[{urls}]", f"--rollout.async_steps={async_steps}", "--objective.importance_cap=2",
        "--optimizer.learning_rate=1e-2", ranks=1 + async_steps,
    )  # fmt: skip
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    stale = [row.get("rollout/staleness") for row in rows]
    assert stale == ([0, 1, 1, 1] if async_steps else [None] * 4)
    for row in rows:
        assert row["mismatch/max_abs"] < 1e-3 or row.get("rollout/staleness")
    if async_steps:
        assert all(row["mismatch/max_abs"] > 1e-3 for row in rows[1:])  # older weights did sample them
        assert all(0 < row["mismatch/after_sync_mean"] < row["mismatch/after_sync"] < 1e-3 for row in rows)
    assert {row["step"] for row in open_run(run).evaluations()} == {0, 2, 4}
    assert list(files_left()) == []


def test_dynamic_sampling_replaces_groups_of_a_batch_that_was_sampled_ahead(servers, tmp_path):
    run = tmp_path / "run"
    urls = ",".join(server.url for server in servers)
    train(
        *SMALL, CPU, "--steps=3", f"--run_dir={run}", "--rollout.engine=vllm_server",
        f"--rollout.server.urls=[{urls}]", "--rollout.async_steps=1", "--objective.dynamic_sampling=true",
        "--optimizer.learning_rate=1e-3",
    )  # fmt: skip
    rows = metrics(run)
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1]
    assert all(row["mismatch/after_sync"] < 1e-3 for row in rows)
    assert max(row["sampling/rounds"] for row in rows[1:]) > 1  # a batch from ahead was not enough
    drawn = []
    for row in rows:
        table = open_run(run).rollouts(step=row["step"], columns=["group", "correct", "prompt_uid"]).to_pandas()
        shares = table.groupby("group")["correct"].mean()
        assert row["sampling/rounds"] == 4 or shares.between(0, 1, inclusive="neither").all()
        drawn += list(table["prompt_uid"].unique())
    assert len(drawn) == len(set(drawn))  # the next batch is drawn after the replacements of this one


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def train_until_killed(run: Path, urls: list[str], *flags: str, ranks: int | None = None) -> Popen[str]:
    """A run without an end that has made two steps."""
    process = start(
        "train.py", *SMALL, CPU, "--steps=100000", "--logging.show_every=null", f"--run_dir={run}",
        "--rollout.engine=vllm_server", f"--rollout.server.urls=[{','.join(urls)}]",
        *flags, ranks=ranks,
    )  # fmt: skip
    wait_for(lambda: steps_of(run) >= 2 or process.poll() is not None)
    return process


def last_words(process: Popen[str], run: Path) -> tuple[str, str]:
    """All that a run without a server wrote, and its one line of error, which names the checkpoint of its last step."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    checkpoint = run / "checkpoints" / f"step_{steps_of(run):06d}"
    assert (checkpoint / "checkpoint.json").exists() and line.endswith(f"--resume {checkpoint}")
    assert list(files_left()) == []
    return errors, line


def steps_of(run: Path) -> int:
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


def test_killed_servers_are_named_and_the_run_can_be_resumed(servers, tmp_path):
    """The first death leaves one server, which goes on; the second stops the run with a checkpoint."""
    run, detour = tmp_path / "run", Detour(servers[0])
    overlap = ["--rollout.async_steps=1", "--objective.importance_cap=2"]
    process = train_until_killed(
        run, [detour.url, servers[1].url], "--rollout.server.on_death=continue", *overlap, ranks=2
    )
    detour.cut()
    reached = steps_of(run)
    wait_for(lambda: steps_of(run) >= reached + 3 or process.poll() is not None)
    servers[1].kill()
    errors, line = last_words(process, run)
    assert f"{detour.url} does not answer" in errors and "it is left out, 1 go on" in errors
    assert servers[1].url in line and "none is left" in line
    step = steps_of(run)
    checkpoint = run / "checkpoints" / f"step_{step:06d}"
    # The servers were all that was missing: another sampler takes the run up.
    train(f"--resume={checkpoint}", f"--steps={step + 1}", "--rollout.engine=transformers", "--rollout.server.urls=[]",
          "--rollout.async_steps=0", ranks=2)  # fmt: skip
    assert [row["step"] for row in metrics(run)] == list(range(1, step + 2))


def test_a_server_that_is_killed_stops_the_run_with_a_checkpoint(server, tmp_path):
    run = tmp_path / "run"
    process = train_until_killed(run, [server.url])
    server.kill()
    errors, line = last_words(process, run)
    assert line.startswith(f"error: vLLM server {server.url} does not answer")
    assert "it is left out" not in errors
