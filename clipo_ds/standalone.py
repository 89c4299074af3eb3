"""What one does with a trained model away from its run: score it on data, export it. No DeepSpeed engine is built."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from clipo_ds import arithmetic, distributed
from clipo_ds.checkpoint import newest_checkpoint, step_of
from clipo_ds.config import load_config
from clipo_ds.data import load_prompts
from clipo_ds.evaluate import EvaluationResult, ProblemResult, response_columns, run_problems, summarise
from clipo_ds.generation import TransformersEngine
from clipo_ds.models import inspect_model, load_causal_lm, materialise_model, stop_token_ids
from clipo_ds.records import RunWriter
from clipo_ds.rewards import Judge
from clipo_ds.schema import DataConfig, RewardConfig, TrainConfig, require
from clipo_ds.sources import name_sources
from clipo_ds.thoughts import thought_tags
from clipo_ds.turns import split_stops
from clipo_ds.types import InputError, Prompt
from clipo_ds.unverified import unverified_in_words

logger = logging.getLogger(__name__)


def model_reference(path: str) -> tuple[str, TrainConfig | None]:
    """Turn a run folder or checkpoint into its model folder; anything else is a model reference already.

    Returns the reference and, for a run or checkpoint, the configuration that it was trained with.

    Raises:
        InputError: A run folder without a whole checkpoint.
    """
    folder = Path(path)
    if (folder / "checkpoint.json").exists():
        return str(folder / "model"), _run_config(folder.resolve().parent.parent)
    if (folder / "config.yaml").exists():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise InputError(f"`model` must be a run with a checkpoint, got '{path}', which has none yet")
        return str(newest / "model"), _run_config(folder)
    return path, None


def evaluate_model(arguments: Namespace) -> list[EvaluationResult]:
    """Score a model on data files as `scripts/evaluate.py` is asked to, one result a file.

    What a run's checkpoint answered is kept in the run's `separate_evaluations/`, with the settings; the run's own
    evaluations stay as they are.

    Raises:
        InputError: A wrong model, file or number; nothing has been loaded then.
    """
    for name, low in (("samples", 1), ("max_new_tokens", 1), ("max_prompt_tokens", 1), ("max_sequences", 1)):
        require(getattr(arguments, name) >= low, name, f"at least {low}", getattr(arguments, name))
    require(arguments.temperature > 0, "temperature", "positive", arguments.temperature)
    require(0 < arguments.top_p <= 1, "top_p", "in (0, 1]", arguments.top_p)
    limit = arguments.max_problems
    require(limit is None or limit >= 1, "max_problems", "at least 1", limit)
    output = arguments.output
    require(output is None or Path(output).parent.is_dir(), "output", "a file in a folder that exists", output)
    reference, config = model_reference(arguments.model)
    trusted = arguments.trust_remote_code or (config is not None and config.model.trust_remote_code)
    facts = inspect_model(reference, trust_remote_code=trusted)
    sources, data = _test_data(arguments, config)
    tests = _test_prompts(arguments, config, sources, data, facts.tokenizer)
    device = distributed.own_device()
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = load_causal_lm(materialise_model(reference), dtype=dtype, trust_remote_code=trusted, device=device)
    stop_ids, stop_texts = split_stops(facts.tokenizer, config.rollout.stop if config is not None else ())
    engine = TransformersEngine(
        model,
        facts.tokenizer,
        max_sequences=arguments.max_sequences,
        stop_ids=stop_ids | stop_token_ids(facts.tokenizer, model.generation_config),
        stop_texts=stop_texts,
        thought_tags=data.thought_tags,
    )
    tags = thought_tags(data.thought_tags, facts.tokenizer.chat_template)
    sampled = arguments.samples > 1
    sampling = {
        "samples": arguments.samples,
        "temperature": arguments.temperature if sampled else 0.0,
        "top_p": arguments.top_p if sampled else 1.0,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
    }
    how_read = {
        key: value for key, value in dataclasses.asdict(data).items() if key not in ("train", "test", "max_rows")
    }
    settings = sampling | {"max_problems": limit, "dtype": dtype} | how_read
    results = []
    with Judge(RewardConfig(), overlong_buffer=0, max_new_tokens=arguments.max_new_tokens, tags=tags) as judge:
        for name, prompts in tests.items():
            rows = run_problems(engine, prompts[:limit], judge, **sampling)
            results.append(summarise(name, rows))
            _record(reference, rows, results[-1], {"source": sources.get(name), "settings": settings})
            failed = [row.unverified for row in rows if row.unverified is not None]
            for warning in unverified_in_words(failed, data=name).values():
                logger.warning(warning)
    return results


def export_model(path: str, out: Path, *, adapter: bool, dtype: str | None) -> None:
    """Write a run's or checkpoint's policy as a folder that plain transformers or PEFT loads.

    LoRA policies are merged into their base in float32 and rounded once; with `adapter` the adapter is copied as it is.

    Raises:
        InputError: No such run, no checkpoint, the target exists, or an adapter is asked of a full policy.
    """
    reference, config = model_reference(path)
    folder = Path(reference)
    if config is None:
        raise InputError(f"`model` must be a run folder or a checkpoint of one, got {path!r}")
    if out.exists():
        raise InputError(f"`out` must not exist yet, got '{out}'")
    is_adapter = (folder / "adapter_config.json").exists()
    if adapter and not is_adapter:
        raise InputError(f"`adapter` must be left out for a full policy, which has no adapter: '{path}'")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if adapter or (not is_adapter and dtype is None):
        shutil.copytree(folder, partial)
    else:
        trusted = config.model.trust_remote_code
        load_causal_lm(str(folder), dtype=dtype or config.model.dtype, trust_remote_code=trusted).save_pretrained(
            partial
        )
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted).save_pretrained(partial)
    partial.rename(out)


def _record(
    reference: str, rows: Sequence[ProblemResult], result: EvaluationResult, made_with: Mapping[str, Any]
) -> None:
    """Keep an evaluation in the run whose checkpoint was evaluated, if one was and its folder can be written."""
    checkpoint = Path(reference).resolve().parent
    run_dir = checkpoint.parent.parent
    if not (checkpoint / "checkpoint.json").exists() or not os.access(run_dir, os.W_OK):
        return
    step = step_of(checkpoint)
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **made_with, **result.to_dict()}
    file = RunWriter(run_dir).write_separate_evaluation(step, result.name, row, response_columns(rows))
    logger.info("responses in %s", file)


def _run_config(run_dir: Path) -> TrainConfig:
    return load_config(str(run_dir / "config.yaml"))


def _test_data(arguments: Namespace, config: TrainConfig | None) -> tuple[dict[str, str], DataConfig]:
    """The sources of the test sets by name, none for the tests of the built-in task, and how their rows are read."""
    sources = arguments.data
    if not sources and (config is None or config.task is None):
        sources = [] if config is None else config.data.test
        require(bool(sources), "data", "data files, where the model is not a run with test data of its own", sources)
    base = config.data if config is not None else DataConfig()
    data = dataclasses.replace(
        base,
        system_prompt=arguments.system_prompt or base.system_prompt,
        instruction=arguments.instruction or base.instruction,
        max_prompt_tokens=arguments.max_prompt_tokens,
    )
    return name_sources(sources or []), data


def _test_prompts(
    arguments: Namespace, config: TrainConfig | None, sources: Mapping[str, str], data: DataConfig, tokenizer: object
) -> dict[str, list[Prompt]]:
    if not sources:
        assert config is not None and config.task is not None
        return arithmetic.test_prompts(config.task, tokenizer)
    return {
        name: load_prompts([source], tokenizer, data, max_rows=arguments.max_problems, field="data").prompts
        for name, source in sources.items()
    }
