"""The trainer's side of servers that never answer: nobody waits for them longer than was said. Needs no vLLM."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future

import pytest
import torch

from clipo_ds.threads import run_beside
from clipo_ds.vllm_client import ServerClient, ServerError
from clipo_ds.vllm_transfer import Deadline, Failures, NcclTransfer, await_both, on_all

ASKING = """
import signal
import sys
import torch
from clipo_ds.ahead import Ahead
from clipo_ds.distributed import Ranks
from clipo_ds.types import Prompt
from clipo_ds.vllm_client import ServerClient
from clipo_ds.vllm_server import VllmServerEngine
from clipo_ds.vllm_transfer import FileTransfer, on_all

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
client = ServerClient(sys.argv[1], 600.0)
ranks = Ranks(0, 1, 0, torch.device("cpu"))
engine = VllmServerEngine([client], None, [1], ranks, FileTransfer(), max_sequences=8)
ahead = Ahead(engine)

def sample():
    return engine.generate([Prompt(0, "", (2, 3), "0", "test")], 4, max_new_tokens=8, seed=0)

ahead.start(2, sample)
try:
    sample()
except KeyboardInterrupt:
    on_all([client], lambda client: client.call("update_weights", timeout_s=600.0))
"""


def test_ctrl_c_waits_for_no_answer_to_prompts_or_weights() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen([sys.executable, "-c", ASKING, url], stderr=subprocess.PIPE, text=True)
        try:
            connections = [silent.accept() for _ in range(2)]  # of the batch ahead, and of this one
            time.sleep(1)  # until the process waits for the answers
            process.send_signal(signal.SIGINT)
            connections.append(silent.accept())  # of the weights
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT and errors.strip().endswith("KeyboardInterrupt")


CLIENTS = [ServerClient(f"http://127.0.0.1:{port}", 1.0) for port in (1, 2)]


def test_a_group_that_does_not_come_about_in_time_is_reported_for_every_server() -> None:
    never: Future[None] = Future()
    for joining, inviting in ((never, done(None)), (done("group"), never), (never, never)):
        with pytest.raises(Failures, match=r"did not join within 0 s") as caught:
            await_both(joining, inviting, CLIENTS, "did not join", Deadline(0.1))
        assert set(caught.value.errors) == {client.url for client in CLIENTS}
    await_both(done("group"), done(None), CLIENTS, "did not join", Deadline(0.1))


def test_a_server_that_refuses_to_join_ends_the_wait_at_once() -> None:
    def refuse(client: ServerClient) -> None:
        if client is CLIENTS[0]:
            raise ServerError(f"{client.url} answered: no")

    (inviting,) = run_beside([lambda: on_all(CLIENTS, refuse)])
    with pytest.raises(Failures, match=":1 answered: no") as caught:
        await_both(Future(), inviting, CLIENTS, "did not join", Deadline(60.0))
    assert set(caught.value.of_all(CLIENTS).errors) == {client.url for client in CLIENTS}


class HungGroup:
    """The trainer's side of a broadcast that no server takes."""

    def __init__(self) -> None:
        self.num_aborts = 0

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> Future[None]:
        return Future()

    def abort(self) -> None:
        self.num_aborts += 1


@pytest.mark.parametrize("listens", [True, False], ids=["silent", "dead"])
def test_a_broadcast_that_hangs_is_aborted_at_the_deadline_or_with_the_server(listens: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = ServerClient(f"http://127.0.0.1:{silent.getsockname()[1]}", 1.0)
        if not listens:
            silent.close()
        transfer, group = NcclTransfer({client.url: 1}), HungGroup()
        transfer._group, transfer._members = group, [client.url]
        piece, began = [("weight", torch.ones(2))], time.monotonic()
        with pytest.raises(Failures, match="within 1 s" if listens else "does not answer"):
            transfer.send([client], piece, last=False, deadline=Deadline(1.0))
        assert time.monotonic() - began < 5 and group.num_aborts == 1
        with pytest.raises(Failures, match="update that failed"):  # and not on a communicator that is gone
            transfer.send([client], piece, last=True, deadline=Deadline(1.0))
        assert transfer._members == [] and group.num_aborts == 1  # the next update meets anew


def done(result: object) -> Future[object]:
    future: Future[object] = Future()
    future.set_result(result)
    return future
