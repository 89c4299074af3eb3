"""Two ranks that hold one vLLM engine together, started by test_vllm_engine.py; the argument is a folder to work in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from test_vllm_engine import ENGINE, TOKENIZER, largest_gap, make_model, make_prompts, weights

from clipo_ds import distributed
from clipo_ds.vllm_engine import VllmEngine


def main(folder: str) -> None:
    """Sync and sample twice, with unequal and with empty shares of the prompts."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    # On a CPU vLLM names shared memory after what stands behind the last colon, which must be no slash.
    where = (f"env://:{os.environ['MASTER_PORT']}", int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]))
    ExecutorWithExternalLauncher._distributed_args = lambda self: where
    ranks = distributed.start()
    if ranks.is_main:
        make_model().save_pretrained(folder)
    distributed.barrier()
    engine = VllmEngine(folder, TOKENIZER, **ENGINE, tensor_parallel=2)
    prompts = make_prompts(3, 5, 7)
    for seed, own in ((1, prompts[:1] if ranks.is_main else prompts[1:]), (2, prompts if ranks.is_main else [])):
        model = make_model(seed)
        engine.load_weights(weights(model).items())
        groups = engine.generate(own, 4, max_new_tokens=20, seed=0)
        assert [group.prompt for group in groups] == list(own)
        assert not groups or largest_gap(model, groups) < 1e-5
    engine.close()
    distributed.barrier()
    Path(folder, f"rank{ranks.rank}.done").touch()
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[-1])
