"""Only the main thread of a rank computes with several cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from launching import free_port

from clipo_ds.cores import one_core, share_cores, use_cores

# Threads before and after gloo's own threads have copied what a ZeRO-3 rank gathers.
GATHERING = """
import json, os, psutil, torch
torch.set_num_threads(4)
import torch.distributed as dist
from clipo_ds import distributed
if {as_a_rank}:
    distributed.start()
else:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method="tcp://127.0.0.1:{port}")
flat = torch.ones(2**21)
flat.mul_(2.0)  # the main thread's own threads are there
before = psutil.Process().num_threads()
for _ in range(20):
    dist.all_gather([torch.empty_like(flat)], flat)
print(json.dumps([torch.get_num_threads(), psutil.Process().num_threads() - before]))
os._exit(0)
"""


def gathering(as_a_rank: bool, port: int = 0, **environment: str) -> list[int]:
    """Threads that the main thread computes with, and threads that came while parameters were gathered."""
    known = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    command = [sys.executable, "-c", GATHERING.format(as_a_rank=as_a_rank, port=port)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=known | {"DS_ACCELERATOR": "cpu"} | environment
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_the_threads_of_gloo_take_no_cores_from_the_main_thread_and_ranks_share_them():
    assert gathering(as_a_rank=False, port=free_port())[1] >= 3  # what a plain process group does
    assert gathering(as_a_rank=True) == [4, 0]
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert gathering(as_a_rank=True, MASTER_PORT=str(free_port()), **launched) == [2, 0]


@pytest.mark.parametrize(("num_processes", "share"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_processes_share_the_cores_of_a_machine(four_threads, monkeypatch, num_processes, share):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share_cores(num_processes)
    assert torch.get_num_threads() == share


def test_what_the_user_or_the_launcher_has_set_is_kept(four_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    share_cores(2)
    assert torch.get_num_threads() == 4


def test_a_thread_that_has_not_computed_yet_gets_what_it_asks_for():
    code = "import torch; from clipo_ds.cores import use_cores; use_cores(2); print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["2"]


def test_one_core_for_a_while(four_threads):
    use_cores(3)
    with one_core():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
