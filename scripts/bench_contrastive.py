"""Group contrastive loss and its backward pass, in clipo_ds's block form against the plain N x N form, side by side.

    python scripts/bench_contrastive.py

Times are medians over repeats in one process, the two forms in turns on the same rollouts; values and gradients are
compared before. Memory is the rise of the resident set's peak above what is resident before the call, each form in a
fresh process of its own; it holds everything a call adds, the gradient of the embeddings included.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clipo_ds.contrastive import LOSSES, SIMILARITIES, contrastive_loss

GOAL_RATIO = 100
GOAL_MEGABYTES = 50
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def make_rollouts(rollouts: int, dim: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings, verdicts (half of them right) and contiguous groups."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(rollouts, dim, generator=generator)
    embeddings /= embeddings.norm(dim=1, keepdim=True)
    correct = torch.rand(rollouts, generator=generator) < 0.5
    return embeddings.requires_grad_(), correct, torch.arange(rollouts) // group_size


def block_form(embeddings: Tensor, correct: Tensor, group: Tensor, options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    words = {"loss": options.loss, "similarity": options.similarity, "temperature": options.temperature}
    return contrastive_loss(embeddings, correct, group, generator=generator, **words).mean


def dense_form(embeddings: Tensor, correct: Tensor, group: Tensor, options: argparse.Namespace) -> Tensor:
    """The same loss over all pairs of the batch with masks, as the published code has it (but in log space)."""
    cosine = embeddings @ embeddings.T
    similar = cosine if options.similarity == "cosine" else 1 - (2 - 2 * cosine).clamp(min=1e-8).sqrt()
    logits = similar / options.temperature
    others = (group[:, None] == group[None, :]) & ~torch.eye(len(group), dtype=torch.bool)
    positive = others & correct[:, None] & correct[None, :]
    valid = positive.any(dim=1) & (others & ~correct[None, :]).any(dim=1) & correct
    spread = logits.masked_fill(~others, -1e30).logsumexp(dim=1)
    count = positive.sum(dim=1).clamp(min=1)
    if options.loss == "infonce":
        draw = torch.rand(len(group), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        rank = (draw * count).long()
        chosen = (positive.cumsum(dim=1, dtype=torch.int32) <= rank[:, None]).sum(dim=1).clamp(max=len(group) - 1)
        pull = logits.gather(1, chosen[:, None]).squeeze(1)
    elif options.loss == "supcon_out":
        pull = logits.masked_fill(~positive, 0.0).sum(dim=1) / count
    else:
        pull = logits.masked_fill(~positive, -1e30).logsumexp(dim=1)
        pull = pull - count.log() if options.loss == "supcon_in" else pull
    return torch.where(valid, spread - pull, 0.0).sum() / valid.sum().clamp(min=1)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, argparse.Namespace], Tensor]] = {
    "block": block_form,
    "dense": dense_form,
}


def seconds_of(form: str, rollouts: tuple[Tensor, Tensor, Tensor], options: argparse.Namespace) -> float:
    rollouts[0].grad = None
    start = time.perf_counter()
    FORMS[form](*rollouts, options).backward()
    return time.perf_counter() - start


def disagreement(rollouts: tuple[Tensor, Tensor, Tensor], options: argparse.Namespace) -> tuple[float, float]:
    """Largest difference of the two forms' losses, and of their gradients relative to the largest slope."""
    values, slopes = [], []
    for form in FORMS.values():
        rollouts[0].grad = None
        loss = form(*rollouts, options)
        loss.backward()
        values.append(loss.item())
        slopes.append(rollouts[0].grad)
    scale = slopes[1].abs().max()
    return abs(values[0] - values[1]), ((slopes[0] - slopes[1]).abs().max() / scale).item()


def resident_megabytes(field: str) -> float:
    """VmRSS or VmHWM of this process; without /proc the lifetime peak, which bounds both."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def extra_megabytes_here(form: str, options: argparse.Namespace) -> float:
    """What one call adds to the resident set, in this fresh process."""
    small = make_rollouts(4 * options.group_size, options.dim, options.group_size)
    seconds_of(form, small, options)  # loads the libraries and starts the threads
    rollouts = make_rollouts(options.rollouts, options.dim, options.group_size)
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # the peak starts again from what is resident now
    before = resident_megabytes("VmRSS")
    seconds_of(form, rollouts, options)
    return resident_megabytes("VmHWM") - before


def extra_megabytes(form: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", form]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=8192, help="N, a multiple of the group size (8192)")
    parser.add_argument("--dim", type=int, default=512, help="size of an embedding (512)")
    parser.add_argument("--group_size", type=int, default=16, help="rollouts a prompt (16)")
    parser.add_argument("--loss", choices=LOSSES, default="infonce", help="contrastive loss (infonce)")
    parser.add_argument("--similarity", choices=SIMILARITIES, default="cosine", help="similarity (cosine)")
    parser.add_argument("--temperature", type=float, default=0.05, help="contrastive temperature (0.05)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed calls of the N x N form; the block form gets 7 x (3)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads for both; more suffer on a busy machine (1)"
    )
    parser.add_argument("--memory_of", choices=sorted(FORMS), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rollouts % options.group_size:
        parser.error(f"--rollouts must be a multiple of --group_size, got {options.rollouts}")
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        sys.stdout.write(f"{extra_megabytes_here(options.memory_of, options)}\n")
        return

    memory = {form: extra_megabytes(form) for form in FORMS}
    rollouts = make_rollouts(options.rollouts, options.dim, options.group_size)
    value_gap, slope_gap = disagreement(rollouts, options)  # warms both up as well
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(options.repeats):
        times["dense"].append(seconds_of("dense", rollouts, options))
        times["block"].extend(seconds_of("block", rollouts, options) for _ in range(7))
    median = {form: statistics.median(values) for form, values in times.items()}
    ratio = median["dense"] / median["block"]
    megabytes = rollouts[0].nbytes / 2**20
    sys.stdout.write(
        f"{options.loss}, {options.similarity}: {options.rollouts} rollouts x {options.dim}, groups of "
        f"{options.group_size}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"the forms differ by {value_gap:.1e} in the loss, {slope_gap:.1e} of the largest slope in the gradient\n\n"
        f"{'':12}{'forward + backward':>20}{'extra peak memory':>20}\n"
        f"{'N x N':12}{median['dense']:>18.3f} s{memory['dense']:>17.1f} MB\n"
        f"{'clipo_ds':12}{median['block']:>18.4f} s{memory['block']:>17.1f} MB"
        f"   ({megabytes:.1f} MB of it the gradient itself)\n\n"
        f"ratio {ratio:.0f}x (goal at least {GOAL_RATIO}x), "
        f"memory {memory['block']:.1f} MB (goal under {GOAL_MEGABYTES} MB)\n"
    )


if __name__ == "__main__":
    main()
