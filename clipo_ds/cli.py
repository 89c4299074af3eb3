"""What scripts/*.py call: arguments, logging, and errors as one clear line.

Exit codes: 0 done; 2 something the user gave is wrong; 1 the run failed; 130 it was stopped and left a checkpoint.
Modules with torch are imported after the arguments have been read, so that `--help` and a typo answer at once.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clipo_ds import allocator, disk
from clipo_ds.config import load_config, split_train_arguments
from clipo_ds.types import InputError, MismatchError, NotSaved, RunStopped, SamplerLost, VerifierLost

logger = logging.getLogger(__name__)


def train_main(argv: Sequence[str] | None = None) -> int:
    """`deepspeed scripts/train.py --ds_config FILE --recipe NAME [--section.field value …]`."""

    def run() -> None:
        recipe, overrides = split_train_arguments(sys.argv[1:] if argv is None else argv)
        config = load_config(recipe, overrides)
        from clipo_ds.trainer import train

        run_dir = train(config)
        if _is_main():
            _show_run(run_dir)

    return _guarded(run)


def compare_main(argv: Sequence[str] | None = None) -> int:
    """`deepspeed scripts/compare.py --recipe NAME --arms grpo,grpo+clipo --seeds 0,1,2 [--section.field value …]`."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        allow_abbrev=False,  # --seed is a recipe field, not short for --seeds
        description="Train arms against each other over seeds. Every recipe field is a flag too (see train.py --help).",
    )
    parser.add_argument("--recipe", required=True, help="shipped recipe or YAML file")
    parser.add_argument(
        "--arms", required=True, help="comma-separated: an objective, optionally with +clipo or +placebo"
    )
    parser.add_argument("--seeds", default="0", help="comma-separated whole numbers (default: 0)")
    parser.add_argument("--out", help="folder for the runs and comparison.json; what is whole in it is not repeated")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args(argv)

    def run() -> None:
        seeds = [_whole_number(seed) for seed in arguments.seeds.split(",")]
        load_config(arguments.recipe, overrides)
        from clipo_ds import compare, distributed
        from clipo_ds.display import wide_console
        from clipo_ds.folder_lock import fresh_folder

        distributed.start()
        fresh_name = f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
        out = Path(arguments.out or distributed.from_main(lambda: fresh_folder(Path("runs"), fresh_name)))
        try:
            path = compare.compare(arguments.recipe, overrides, arguments.arms.split(","), seeds, out)
        finally:
            if _is_main() and not arguments.out:
                with contextlib.suppress(OSError):  # it holds something, as it should
                    out.rmdir()
        if _is_main():
            console = wide_console()
            console.print(compare.comparison_table(json.loads(path.read_text())))
            console.print(str(path), soft_wrap=True)

    return _guarded(run)


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/evaluate.py --model RUN_OR_CHECKPOINT_OR_HF_ID --data FILE [FILE …] [--samples 16 …]`."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Score a model on data files.")
    parser.add_argument(
        "--model", required=True, help="run folder, checkpoint, adapter, model folder, HF id or package:NAME"
    )
    parser.add_argument(
        "--data", nargs="+", help="parquet or jsonl files or dataset ids (default: the run's own test sets)"
    )
    parser.add_argument("--samples", type=int, default=1, help="responses a problem; 1 decodes greedily (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.6, help="with several samples (default: 0.6)")
    parser.add_argument("--top_p", type=float, default=0.95, help="with several samples (default: 0.95)")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="length cap, tokens (default: 1024)")
    parser.add_argument(
        "--max_prompt_tokens", type=int, default=2048, help="longer prompts are dropped (default: 2048)"
    )
    parser.add_argument("--max_problems", type=int, help="only the first n problems of each file")
    parser.add_argument("--max_sequences", type=int, default=64, help="responses decoded at once (default: 64)")
    parser.add_argument("--instruction", help="text appended to every user message")
    parser.add_argument("--system_prompt", help="system message before every prompt")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="(default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="let model code that comes with the weights run (default: as the run was trained)",
    )
    parser.add_argument("--output", help="write the figures as JSON here")
    arguments = parser.parse_args(argv)

    def run() -> None:
        from clipo_ds.standalone import evaluate_model

        results = evaluate_model(arguments)
        from clipo_ds.display import wide_console
        from clipo_ds.evaluate import evaluation_table

        wide_console().print(evaluation_table(results))
        text = json.dumps([result.to_dict() for result in results], indent=2)
        if arguments.output:
            Path(arguments.output).write_text(text + "\n")
            logger.info("wrote %s", arguments.output)
        else:
            sys.stdout.write(text + "\n")

    return _guarded(run)


def export_main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/export.py RUN_OR_CHECKPOINT OUT`."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Write a run's policy as a plain Hugging Face folder, or as a PEFT adapter."
    )
    parser.add_argument(
        "model", metavar="RUN_OR_CHECKPOINT", help="run folder (its newest checkpoint) or one checkpoint"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--adapter", action="store_true", help="for LoRA runs: the adapter alone, instead of the merged model"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="precision of the merged model (default: the run's)"
    )
    arguments = parser.parse_args(argv)

    def run() -> None:
        from clipo_ds.standalone import export_model

        export_model(arguments.model, Path(arguments.out), adapter=arguments.adapter, dtype=arguments.dtype)
        logger.info("wrote %s", arguments.out)

    return _guarded(run)


def serve_main(argv: Sequence[str] | None = None) -> int:
    """`python scripts/serve.py --model REFERENCE | --recipe NAME [--section.field value …] [--port 8000] […]`."""
    parser = argparse.ArgumentParser(
        prog="serve.py",
        allow_abbrev=False,
        description="Start a vLLM server that takes weights from a run (rollout.engine vllm_server). Flags that are "
        "neither here nor fields of a recipe are vLLM's own: --max-model-len, --tensor-parallel-size, …",
    )
    parser.add_argument("--model", help="HF id, model folder or package:NAME (default: the recipe's)")
    parser.add_argument("--recipe", help="recipe of the run: gives model, precision and lengths; its flags go here too")
    parser.add_argument("--host", default="127.0.0.1", help="whoever reaches it may do anything (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument(
        "--weights",
        choices=["auto", "files", "nccl"],
        default="auto",
        help="how new weights arrive (default: nccl on a GPU, files in memory else)",
    )
    arguments, rest = parser.parse_known_args(argv)

    def run() -> None:
        from clipo_ds.serve import serve

        serve(arguments, rest)

    return _guarded(run)


def run_ranks(main: Callable[[], int]) -> NoReturn:
    """Run the command of a script that has ranks and end the process with its exit code.

    The interpreter is not taken down: a thread of gloo that still holds the tensors of the last collective would ask
    for it meanwhile and abort a process that has done all its work (pytorch/pytorch pull request 179291).
    """
    code = 1  # of an exception that nobody catches

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # none there, its reader gone, or closed
                stream.flush()
        os._exit(code)

    atexit.register(end)  # the first to be registered is the last to be called
    allocator.use_huge_pages()
    try:
        code = main()
    except SystemExit as request:  # of argparse: --help, or a flag that is wrong
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
        raise
    sys.exit(code)


def _guarded(run: Callable[[], Any]) -> int:
    """Run with logging set up; turn what a user can understand into one line and an exit code."""
    _set_up_logging()
    try:
        run()
    except InputError as error:
        return _fail(f"error: {error}", 2)
    except (FloatingPointError, MismatchError, NotSaved, SamplerLost, VerifierLost) as error:
        return _fail(f"error: {error}", 1)
    except OSError as error:
        if error.errno not in disk.FULL:
            raise
        return _fail(f"error: '{error.filename}' could not be written: {error.strerror}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except RunStopped as stopped:
        return _fail(str(stopped), 130)
    finally:
        _leave_process_group()
    return 0


def _fail(message: str, code: int) -> int:
    if _is_main():
        sys.stderr.write(message + "\n")
    return code


def _leave_process_group() -> None:
    if "clipo_ds.distributed" in sys.modules:
        from clipo_ds import distributed

        distributed.stop()


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _set_up_logging() -> None:
    level = logging.INFO if _is_main() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("clipo_ds").setLevel(level)
    # DeepSpeed calls collectives by names that torch is about to rename; nothing that a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for noisy in ("DeepSpeed", "httpx", "filelock"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"`seeds` must be comma-separated whole numbers, got {text!r}") from None


def _show_run(run_dir: Path) -> None:
    """After a run: first against last evaluation, and what lies in the run folder."""
    from clipo_ds.display import before_and_after_table, wide_console
    from clipo_ds.records import open_run

    console = wide_console()
    evaluations = open_run(run_dir).evaluations()
    if evaluations:
        console.print(before_and_after_table(evaluations))
    console.print(f"{run_dir}/", soft_wrap=True, highlight=False)
    for path in sorted(run_dir.iterdir()):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if inside else path.stat().st_size
        names = f"/ ({len(inside)}: {inside[0].name} … {inside[-1].name})" if inside else ""
        console.print(f"  {path.name}{names}  {size:,} bytes", highlight=False, soft_wrap=True)
