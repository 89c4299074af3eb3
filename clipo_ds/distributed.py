"""Facts about the ranks, and the few collectives that a training step needs.

Every function is called by all ranks in the same order. Imports torch, DeepSpeed's communication, `allocator`,
`cores`, `network` and `types` only.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from clipo_ds import allocator
from clipo_ds.cores import share_cores
from clipo_ds.network import free_port
from clipo_ds.types import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that speaks and writes."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Positions that this rank takes of `total` equal items; earlier ranks take one more where it does not
        divide."""
        base, extra = divmod(total, self.world_size)
        start = self.rank * base + min(self.rank, extra)
        return range(start, start + base + (self.rank < extra))


def start() -> Ranks:
    """Join the process group that the launcher describes; without a launcher, be a group of one.

    Raises:
        InputError: The ranks cannot meet at the address and port that the launcher was given.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if not dist.is_initialized():
        if get_accelerator().device_name() == "cpu":
            share_cores(int(os.environ.get("LOCAL_SIZE", "1")))
        # On the CPU DeepSpeed would compile a shared-memory kernel first: a minute on a laptop, an error without a
        # compiler, a race between runs that start together. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
        except dist.DistNetworkError as error:
            raise _no_meeting(error) from error
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = own_device(local_rank)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


def own_device(local_rank: int = 0) -> torch.device:
    """The device of a process: the accelerator's of its number where there is one, unless DS_ACCELERATOR says cpu."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(local_rank))


def _no_meeting(error: Exception) -> InputError:
    """Why the ranks could not meet, in the launcher's own flags."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in str(error):
        return InputError(
            f"`--master_port` must be a free port of {address}, got {port}, which another program (or run) holds: "
            "deepspeed --master_port PORT scripts/… takes any free one"
        )
    return InputError(
        "`--master_addr` and `--master_port` must be where rank 0 of this run can be reached, got "
        f"{address} and {port} ({' '.join(str(error).split())})"
    )


def stop() -> None:
    """Leave the process group, so that the process ends without complaints."""
    if dist.is_initialized():
        # DeepSpeed keeps groups of its own beside the default one; its call ends them all.
        deepspeed.comm.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def sum_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Add the values of one mapping over all ranks, in float64; the keys must be the same on every rank."""
    names = sorted(values)
    # NCCL and gloo both carry float64, and sums of counts and losses over thousands of rollouts want it.
    total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def max_over_ranks(value: float, device: torch.device) -> float:
    """Largest value over all ranks."""
    largest = torch.tensor([float(value)], dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Add the gradients of replicated parameters over all ranks in place; a missing gradient counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Concatenate ``[N_r, ...]`` of all ranks along the first dimension, in rank order.

    Returns the whole ``[sum N_r, ...]`` and the position at which this rank's rows begin. No gradient flows.
    """
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    # Collectives want equal shapes: pad to the longest share and cut the padding off again.
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return whole, sum(sizes[: dist.get_rank()])


def gather_objects(value: Any) -> list[Any] | None:
    """Collect one picklable object a rank on rank 0, in rank order; None on the others."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def all_objects(value: Any) -> list[Any]:
    """Give every rank one picklable object of each rank, in rank order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Give every rank the object of rank 0."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, which alone calls it: for what a look at the disk decides, since ranks that look for
    themselves may see different things, and part ways.

    Raises:
        Exception: On every rank, what it raised.
    """
    found: T | None = None
    with together():
        if dist.get_rank() == 0:
            found = work()
    return broadcast_object(found)


def raise_everywhere(error: Exception | None) -> None:
    """Raise on every rank when any rank has an error, so that no rank waits for one that has left.

    Each rank raises its own error where it has one, and that of the first failing rank otherwise; `is_everywhere` then
    knows it.
    """
    for first in (error, *all_objects(_that_travels(error))):
        if first is not None:
            first.raised_everywhere = True  # type: ignore[attr-defined]
            raise first


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block whose errors on any rank are raised on every rank, behind it. No rank may wait for another inside."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others would wait for this rank
        failure = error
    raise_everywhere(failure)


def is_everywhere(error: Exception) -> bool:
    """Whether all ranks have raised an error, because `raise_everywhere` did or because there is one rank alone."""
    return dist.get_world_size() == 1 or getattr(error, "raised_everywhere", False)


def _that_travels(error: Exception | None) -> Exception | None:
    """The error, or what it says where another process could not make it anew."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # of the error's own class, which may be anybody's
        return RuntimeError(f"{type(error).__name__}: {error}")
