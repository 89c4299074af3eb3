"""The trainer's side of a weight update in vLLM servers: through files in memory, or over NCCL between GPUs.

Both drive vLLM's own calls, `/start_weight_update`, `/update_weights` for every piece, `/finish_weight_update`, on all
living servers at once, and only on rank 0; they differ in how a piece reaches the servers. A piece is bounded in bytes,
so neither side ever holds a second whole model. Layer L2; vLLM itself is imported for NCCL only.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipo_ds.network import free_port
from clipo_ds.shared_memory import shared_folder
from clipo_ds.threads import run_beside
from clipo_ds.vllm_client import ServerClient, ServerDied, ServerError

PIECE_BYTES = 256 * 1024**2
"""Most bytes of weights that are on their way at once; a single larger weight goes alone."""
MARGIN_BYTES = 16 * 1024**2
POLL_S = 0.002

Piece = list[tuple[str, Tensor]]


class Deadline:
    """What is left of a time limit."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s

    def left(self) -> float:
        """Seconds, never quite 0, so that a call that is late fails by itself."""
        return max(0.001, self._end - time.monotonic())


class Failures(Exception):
    """Servers that a step of an update failed on, each with what it said."""

    def __init__(self, errors: Mapping[str, Exception]) -> None:
        super().__init__("; ".join(str(error) for error in errors.values()))
        self.errors = dict(errors)  # by URL

    def of_all(self, clients: Sequence[ServerClient]) -> Failures:
        """The same where servers wait for each other, so that what stops one stops all."""
        return Failures({client.url: self.errors.get(client.url, self) for client in clients})


class Transfer(Protocol):
    """A way for one piece of an update to reach all servers."""

    def prepare(self, clients: Sequence[ServerClient], deadline: Deadline) -> None:
        """Make ready for an update of these servers, before it begins; raises `Failures`."""
        ...

    def send(self, clients: Sequence[ServerClient], piece: Piece, *, last: bool, deadline: Deadline) -> None:
        """Give one piece to all servers; raises `Failures`."""
        ...


def send_weights(
    transfer: Transfer,
    clients: Sequence[ServerClient],
    weights: Iterable[tuple[str, Tensor]],
    *,
    version: str,
    limit_s: float,
    lose: Callable[[ServerClient, Exception], None],
) -> None:
    """Replace the weights of all servers, which must be idle, and forget what they computed with the old ones.

    Args:
        transfer: How the pieces get there.
        clients: The living servers.
        weights: As `weight_sync.iterate_weights` gives them; read to the end unless a server fails.
        version: Name of these weights, which the servers then report.
        limit_s: For all of it, seconds.
        lose: Told of a server that failed or was late, whose weights are unknown from then on; the update goes on with
            the others, unless this raises.

    Raises:
        OSError: As `FileTransfer.send`.
    """
    deadline = Deadline(limit_s)
    living = list(clients)

    def without_the_lost(step: Callable[[], None]) -> None:
        try:
            step()
        except Failures as failures:
            for client in list(living):
                if client.url in failures.errors:
                    lose(client, failures.errors[client.url])
                    living.remove(client)

    without_the_lost(lambda: transfer.prepare(living, deadline))
    without_the_lost(lambda: on_all(living, lambda client: _start(client, deadline)))
    for piece, last in _pieces(weights, PIECE_BYTES):
        without_the_lost(functools.partial(transfer.send, living, piece, last=last, deadline=deadline))
    without_the_lost(lambda: on_all(living, lambda client: _finish(client, version, deadline)))


def on_all(clients: Sequence[ServerClient], action: Callable[[ServerClient], object]) -> None:
    """Do something with all servers at once.

    Raises:
        Failures: It went wrong on some of them; it was done on all.
    """
    errors: dict[str, Exception] = {}
    running = run_beside([functools.partial(action, client) for client in clients])
    for client, future in zip(clients, running, strict=True):
        try:
            future.result()
        except (ServerDied, ServerError) as error:
            errors[client.url] = error
    if errors:
        raise Failures(errors)


def _start(client: ServerClient, deadline: Deadline) -> None:
    try:
        client.call("start_weight_update", timeout_s=deadline.left())
    except ServerError as error:
        if "already active" not in str(error):
            raise
        # A trainer was killed in the middle of an update. What it left is overwritten by this one.
        client.call("finish_weight_update", timeout_s=deadline.left())
        client.call("start_weight_update", timeout_s=deadline.left())


def _finish(client: ServerClient, version: str, deadline: Deadline) -> None:
    client.call("finish_weight_update", {"weight_version": version}, timeout_s=deadline.left())
    while not client.call("reset_prefix_cache", timeout_s=deadline.left())["success"]:
        time.sleep(POLL_S)  # blocks are still held by requests that a client gave up


def _pieces(weights: Iterable[tuple[str, Tensor]], budget: int) -> Iterator[tuple[Piece, bool]]:
    """Copies of the weights in pieces of bounded size, and whether a piece is the last."""
    piece: Piece = []
    size = 0
    for name, tensor in weights:
        cost = tensor.numel() * tensor.element_size()
        if piece and size + cost > budget:
            yield piece, False
            piece, size = [], 0
        piece.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += cost
    yield piece, True


class FileTransfer:
    """Pieces as safetensors files in memory that servers on this machine read; a file is gone after its piece."""

    def prepare(self, clients: Sequence[ServerClient], deadline: Deadline) -> None:
        """Nothing to do."""

    def send(self, clients: Sequence[ServerClient], piece: Piece, *, last: bool, deadline: Deadline) -> None:
        """Write one file and have all servers load it.

        Raises:
            Failures: As `on_all`.
            OSError: The memory does not hold the file.
        """
        with shared_folder() as folder:
            size, free = sum(tensor.nbytes for _, tensor in piece), shutil.disk_usage(folder).free
            if free < size + MARGIN_BYTES:  # writing into memory that is full ends the process
                raise OSError(f"{folder} must have room for a piece of {size:,} bytes, got {free:,} bytes free")
            path = str(folder / "weights.safetensors")
            save_file({name: tensor.cpu() for name, tensor in piece}, path)
            body = {"update_info": {"path": path, "last": last}}
            on_all(clients, lambda client: client.call("update_weights", body, timeout_s=deadline.left()))


class NcclTransfer:
    """Pieces broadcast from rank 0's GPU to the servers' workers, in one NCCL group of trainer and workers.

    The group is made at the first update, and again when a server has been left out, since a group with a dead member
    never finishes a call. All that it does lies on a stream of its own: what waits for a dead server there keeps
    nothing else on the GPU waiting, the checkpoint above all. A group that failed is aborted.

    Args:
        world_sizes: Workers of each server, by URL.
    """

    def __init__(self, world_sizes: Mapping[str, int]) -> None:
        self._world_sizes = dict(world_sizes)
        self._members: list[str] = []
        self._group: NcclGroup | None = None

    def prepare(self, clients: Sequence[ServerClient], deadline: Deadline) -> None:
        """Make the group anew where other servers are left than it was made of; vLLM refuses that in an update.

        Raises:
            Failures: Of all servers: one of them refused or the group does not come about in time, and the others are
                caught in it.
        """
        if self._members != [client.url for client in clients]:
            try:
                self._join(clients, deadline)
            except Failures as failures:
                raise failures.of_all(clients) from None

    def send(self, clients: Sequence[ServerClient], piece: Piece, *, last: bool, deadline: Deadline) -> None:
        """Announce one piece to all servers and broadcast its weights while they receive.

        Raises:
            Failures: Of all servers: one of them refused the piece or the broadcast is not through in time, and the
                others are caught in it.
        """
        if self._group is None:  # an earlier piece was the last that could be sent
            raise _late(clients, "were left behind by an update that failed", deadline)
        info = {
            "names": [name for name, _ in piece],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in piece],
            "shapes": [list(tensor.shape) for _, tensor in piece],
        }

        def receive(client: ServerClient) -> None:
            client.call("update_weights", {"update_info": info}, timeout_s=deadline.left())

        (receiving,) = run_beside([lambda: on_all(clients, receive)])
        sending = self._group.broadcast([tensor for _, tensor in piece])
        try:
            await_both(sending, receiving, clients, "did not receive the weights", deadline)
        except Failures as failures:
            self._give_up()
            raise failures.of_all(clients) from None

    def _give_up(self) -> None:
        """End what hangs on the GPU; whoever is left is asked into a new group."""
        group, self._group, self._members = self._group, None, []
        if group is not None:
            group.abort()

    def _join(self, clients: Sequence[ServerClient], deadline: Deadline) -> None:
        if self._group is not None:
            self._give_up()  # a member of it is dead
            on_all(clients, lambda client: client.call("shutdown_weight_transfer_engine", timeout_s=deadline.left()))
        offsets, total = {}, 1  # the trainer is rank 0 of the group
        for client in clients:
            offsets[client.url] = total
            total += self._world_sizes[client.url]
        host, port = _own_address(), free_port(host="")
        meeting = {"master_address": host, "master_port": port, "world_size": total, "packed": False}

        def invite(client: ServerClient) -> None:
            body = {"init_info": {**meeting, "rank_offset": offsets[client.url]}}
            client.call("init_weight_transfer_engine", body, timeout_s=deadline.left())

        device = torch.cuda.current_device()
        inviting, joining = run_beside([lambda: on_all(clients, invite), lambda: NcclGroup.join(meeting, device)])
        await_both(joining, inviting, clients, "did not join the trainer's NCCL group", deadline)
        self._group = joining.result()
        self._members = [client.url for client in clients]


class NcclGroup:
    """vLLM's NCCL communicator with the stream that all its calls lie on.

    Args:
        communicator: vLLM's `PyNcclCommunicator`.
        stream: A CUDA stream that nothing else uses.
    """

    def __init__(self, communicator: Any, stream: torch.cuda.Stream) -> None:
        self._communicator = communicator
        self._stream = stream

    @classmethod
    def join(cls, meeting: Mapping[str, Any], device: int) -> NcclGroup:
        """Meet the servers' workers; waits for them for ever."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        # Streams of torch do not wait for the default stream, nor it for them; and a new thread is on the first GPU.
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):  # of the call that warms the communicator up
                return cls(trainer_init(dict(meeting)), stream)

    def broadcast(self, tensors: Sequence[Tensor]) -> Future[None]:
        """Send tensors from a thread beside; they must stay as they are until the future is done.

        The current stream, which may still be writing them, waits for nothing.
        """
        self._stream.wait_stream(torch.cuda.current_stream())

        def send() -> None:
            with torch.cuda.device(self._stream.device):
                for tensor in tensors:
                    self._communicator.broadcast(tensor, src=0, stream=self._stream)
                    tensor.record_stream(self._stream)  # its memory is not used again before that, whatever happens
                self._stream.synchronize()

        # A queue that is full behind a dead server would block the trainer itself.
        (sending,) = run_beside([send])
        return sending

    def abort(self) -> None:
        """End the calls that are on their way; vLLM waits some seconds for that at most."""
        self._communicator.destroy()


def await_both(
    own: Future[Any], theirs: Future[None], clients: Sequence[ServerClient], what: str, deadline: Deadline
) -> None:
    """Wait for a call that the trainer and the servers make together: either side waits for the other for ever.

    Raises:
        Failures: As `on_all`, or of all servers, that they did not do `what`: it is not through in time.
    """
    done, not_done = wait([own, theirs], timeout=deadline.left(), return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    if not_done:
        raise _late(clients, what, deadline)


def _own_address() -> str:
    from vllm.utils.network_utils import get_ip

    return str(get_ip())


def _late(clients: Sequence[ServerClient], what: str, deadline: Deadline) -> Failures:
    late = ServerDied(f"the servers {what} within {deadline.limit_s:.0f} s")
    return Failures({client.url: late for client in clients})
