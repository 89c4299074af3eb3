"""What a process on the CPU frees it gets again without asking the kernel."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from clipo_ds import allocator

FAULTS = """
import ctypes, os, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 kB, whatever the machine's setting
os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
import torch
from clipo_ds import allocator
{before}
faults = []
for _ in range(10):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**24) for _ in range(4)]  # 64 MB each
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
    del held
print(*faults[-2:])
"""


def faults(before: str) -> list[int]:
    command = [sys.executable, "-c", FAULTS.format(before=before)]
    return [int(n) for n in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc's heap")
def test_freed_memory_is_taken_again_without_page_faults():
    assert min(faults("pass")) > 1000  # of 65,536 pages of 4 kB, or of fewer and larger ones
    assert max(faults("allocator.keep_freed_memory()")) < 100  # after the rounds in which the heap grows


def test_huge_pages_are_asked_for_where_there_are_some_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    monkeypatch.setattr(allocator, "HUGE_PAGES", tmp_path / "absent")
    allocator.use_huge_pages()
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ
    monkeypatch.setattr(allocator, "HUGE_PAGES", tmp_path)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    allocator.use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    allocator.use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
