"""From a configuration to the parts of a run: everything is checked first, then everything is built.

`preflight` reads and checks whatever the user gave (DeepSpeed file, model folder, tokenizer, data, reward functions,
run folder) without loading a weight or writing a file. `build_parts` then loads, builds and, when resuming, restores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from clipo_ds import arithmetic, checkpoint, distributed
from clipo_ds.ahead import Ahead
from clipo_ds.checkpoint import Progress
from clipo_ds.checks import check_ds_config, check_model
from clipo_ds.config import dump_config, read_ds_config
from clipo_ds.contrastive import ContrastiveHead
from clipo_ds.contrastive_term import ContrastiveTerm, load_head
from clipo_ds.data import PromptOrder, load_prompts
from clipo_ds.display import Display
from clipo_ds.distributed import Ranks
from clipo_ds.environment import describe_environment
from clipo_ds.generation import RolloutEngine, TransformersEngine
from clipo_ds.models import (
    ModelFacts,
    inspect_model,
    load_causal_lm,
    materialise_model,
    read_generation_config,
    stop_token_ids,
)
from clipo_ds.objectives import ObjectiveSpec, resolve_objective
from clipo_ds.policy import Policy, build_policy
from clipo_ds.records import RunWriter
from clipo_ds.resuming import check_settings, run_folder
from clipo_ds.rewards import Judge, load_functions
from clipo_ds.schema import TrainConfig
from clipo_ds.shared_memory import remove_left_folders
from clipo_ds.sources import name_sources
from clipo_ds.trackers import Trackers, check_trackers
from clipo_ds.turns import split_stops
from clipo_ds.types import InputError, Prompt
from clipo_ds.vllm_checks import check_vllm, choose_engine
from clipo_ds.vllm_client import check_servers
from clipo_ds.vllm_engine import build_vllm_engine
from clipo_ds.vllm_room import VllmRoom
from clipo_ds.vllm_server import VllmServerEngine
from clipo_ds.weight_sync import sync_weights


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check that needs no weights."""

    config: TrainConfig
    spec: ObjectiveSpec
    ds_config: dict[str, Any]
    model: ModelFacts
    prompts: list[Prompt]
    tests: dict[str, list[Prompt]]
    run_dir: Path
    resume_from: Path | None
    room: VllmRoom | None  # with rollout.engine vllm


@dataclass
class Parts:
    """Everything that a training step works with."""

    config: TrainConfig
    spec: ObjectiveSpec
    ranks: Ranks
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    judge: Judge
    term: ContrastiveTerm | None
    prompts: list[Prompt]
    order: PromptOrder
    tests: dict[str, list[Prompt]]
    run_dir: Path
    writer: RunWriter | None  # on rank 0
    display: Display
    trackers: Trackers
    progress: Progress
    ahead: Ahead | None  # with rollout.async_steps
    stop_requested: bool = False

    def draw(self) -> list[Prompt]:
        """The next `rollout.prompts_per_step` prompts of the global batch, the same on every rank."""
        chosen = self.peek()
        self.progress = Progress(self.progress.step, self.progress.prompts_drawn + len(chosen))
        return chosen

    def peek(self) -> list[Prompt]:
        """What `draw` would give now."""
        size = self.config.rollout.prompts_per_step
        return [self.prompts[i] for i in self.order.batch(self.progress.prompts_drawn, size)]


def preflight(config: TrainConfig, ranks: Ranks) -> Plan:
    """Check all that a run needs; called by all ranks.

    Raises:
        InputError: On every rank, in one line, what is wrong, where, and what would be right.
    """
    # Ranks may read the clock a second apart.
    began = distributed.broadcast_object(time.strftime("%Y%m%d-%H%M%S"))
    plan: Plan | None = None
    wrong: InputError | None = None
    config = choose_engine(config, ranks)
    try:
        plan = _plan(config, ranks, f"{Path(config.recipe or 'run').stem}-{began}")
    except InputError as error:  # one rank may lack a file, have less memory, or not reach what another does
        wrong = error if ranks.is_main else InputError(f"{error} (on rank {ranks.rank}, {socket.gethostname()})")
    distributed.raise_everywhere(wrong)
    assert plan is not None
    return plan


def _plan(config: TrainConfig, ranks: Ranks, fresh_name: str) -> Plan:
    """What `preflight` gives, or the error of this rank; no rank waits for another in here."""
    if config.ds_config is None:
        raise InputError("`ds_config` must be a DeepSpeed JSON file (--ds_config ds_configs/zero3.json), got nothing")
    ds_config = read_ds_config(config.ds_config, ranks.world_size, config)
    if config.rollout.prompts_per_step < ranks.world_size:
        raise InputError(
            f"`rollout.prompts_per_step` must be at least the number of ranks ({ranks.world_size}), "
            f"got {config.rollout.prompts_per_step}"
        )
    run_dir, resume_from = run_folder(config, fresh_name)
    check_settings(config, run_dir, resume_from)
    facts = inspect_model(config.model.path, task=config.task, trust_remote_code=config.model.trust_remote_code)
    if resume_from is not None:
        stage = ds_config["zero_optimization"]["stage"]
        with_term = config.contrastive is not None
        checkpoint.check_resumable(resume_from, ranks.world_size, stage, steps=config.steps, with_term=with_term)
    if config.contrastive is not None and config.contrastive.head_path is not None:
        head = ContrastiveHead(
            facts.config.get_text_config().hidden_size, config.contrastive.head_output_size, config.contrastive.head
        )
        load_head(head, config.contrastive.head_path)
    check_ds_config(config.ds_config, ds_config)
    check_model(config.model, facts)
    split_stops(facts.tokenizer, config.rollout.stop)
    check_trackers(config.logging.trackers)
    spec = resolve_objective(
        config.objective.name,
        clip_low=config.objective.clip_low,
        clip_high=config.objective.clip_high,
        dual_clip=config.objective.dual_clip,
        aggregation=config.objective.aggregation,
        constant_length=config.objective.constant_length or config.rollout.max_new_tokens,
        advantage_normalize=config.objective.advantage_normalize,
        dynamic_sampling=config.objective.dynamic_sampling,
    )
    if spec.dynamic_sampling and config.rollout.group_size == 1:
        raise InputError(
            "`rollout.group_size` must be at least 2 for dynamic sampling (objective.dynamic_sampling, on for dapo): "
            "the rewards of a group of one are all equal; got 1"
        )
    functions = load_functions(config.reward.functions)
    prompts, tests = _load_data(config, facts.tokenizer)
    for function in functions.values():
        function.check_columns(prompts)
    longest = config.data.max_prompt_tokens + config.longest_response
    limit = getattr(facts.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        section = "rollout" if config.longest_response == config.rollout.max_new_tokens else "evaluation"
        raise InputError(
            f"`{section}.max_new_tokens` + data.max_prompt_tokens must fit the model's context of {limit}, "
            f"got {longest}"
        )
    room: VllmRoom | None = None
    if config.rollout.engine == "vllm":
        longest_prompt = max(len(p.token_ids) for some in (prompts, *tests.values()) for p in some)
        room = check_vllm(config, facts.config, ranks, longest_prompt)
    if config.rollout.engine == "vllm_server":
        check_servers(config, facts.config, on_gpu=ranks.device.type != "cpu", sends=ranks.is_main)
    return Plan(config, spec, ds_config, facts, prompts, tests, run_dir, resume_from, room)


def build_judge(config: TrainConfig, spec: ObjectiveSpec) -> Judge:
    """The judge with the objective's default for the overlong penalty filled in."""
    cap = config.rollout.max_new_tokens
    buffer = config.reward.overlong_buffer
    return Judge(
        config.reward,
        overlong_buffer=int(spec.overlong_fraction * cap) if buffer is None else buffer,
        max_new_tokens=cap,
    )


def build_parts(plan: Plan, ranks: Ranks) -> Parts:
    """Load and build everything, restore it when resuming, open the run folder; called by all ranks."""
    config = plan.config
    if ranks.local_rank == 0:
        remove_left_folders()
    # One rank makes what has to be made once (the small model, a converted GGUF file); the others find it.
    if ranks.is_main:
        materialise_model(config.model.path, task=config.task)
    distributed.barrier()
    folder = materialise_model(config.model.path, task=config.task)
    frozen_steps = config.contrastive.head_warmup_steps if config.contrastive else 0
    updates = (config.steps - frozen_steps) * config.optimizer.mini_batches * config.optimizer.epochs_per_batch
    set_seed(config.seed)
    policy = build_policy(
        folder,
        config.model,
        config.optimizer,
        plan.ds_config,
        num_updates=updates,
        with_reference=config.objective.kl_coefficient > 0,
        device=ranks.device,
    )
    term = None
    if config.contrastive is not None:
        term = ContrastiveTerm(config.contrastive, policy.hidden_size, config.seed, ranks)
    progress = Progress(step=0, prompts_drawn=0)
    if plan.resume_from is not None:
        progress = checkpoint.load_checkpoint(plan.resume_from, policy, term, ranks)
        if ranks.is_main:
            checkpoint.remove_later(plan.resume_from)
    with contextlib.ExitStack() as when_failing:
        engine = _build_engine(plan, folder, ranks)
        when_failing.callback(engine.close)
        sync_weights(policy.model, engine)
        display = Display(config.logging, config.steps, enabled=ranks.is_main)
        writer = _open_run_folder(plan, progress, ranks) if ranks.is_main else None
        trackers = _start_trackers(plan, ranks)
        when_failing.callback(trackers.finish)
        judge = build_judge(config, plan.spec)
        when_failing.callback(judge.close)
        distributed.barrier()
        display.say(f"run folder {plan.run_dir}")
        when_failing.pop_all()
    return Parts(
        config=config,
        spec=plan.spec,
        ranks=ranks,
        policy=policy,
        tokenizer=plan.model.tokenizer,
        engine=engine,
        judge=judge,
        term=term,
        prompts=plan.prompts,
        order=PromptOrder(len(plan.prompts), config.seed),
        tests=plan.tests,
        run_dir=plan.run_dir,
        writer=writer,
        display=display,
        trackers=trackers,
        progress=progress,
        ahead=Ahead(engine) if config.rollout.async_steps else None,
    )


def close_parts(parts: Parts) -> None:
    """End worker processes, trackers and vLLM."""
    parts.engine.close()
    parts.judge.close()
    parts.trackers.finish()


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys.

    >>> _flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    limit = config.evaluation.max_problems
    if config.task is not None:
        prompts = arithmetic.train_prompts(config.task, tokenizer)
        tests = arithmetic.test_prompts(config.task, tokenizer)
    else:
        prompts = load_prompts(config.data.train, tokenizer, config.data, max_rows=config.data.max_rows).prompts
        tests = {
            name: load_prompts([source], tokenizer, config.data, max_rows=limit, field="data.test").prompts
            for name, source in name_sources(config.data.test).items()
        }
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest > config.data.max_prompt_tokens:
        raise InputError(
            f"`data.max_prompt_tokens` must be at least {longest} for this task, got {config.data.max_prompt_tokens}"
        )
    if len(prompts) < config.rollout.prompts_per_step:
        raise InputError(
            f"`rollout.prompts_per_step` must be at most the number of training prompts ({len(prompts)}), "
            f"got {config.rollout.prompts_per_step}"
        )
    return prompts, {name: test[:limit] for name, test in tests.items()}


def _build_engine(plan: Plan, folder: str, ranks: Ranks) -> RolloutEngine:
    config, tokenizer = plan.config, plan.model.tokenizer
    generation_config = read_generation_config(folder, trust_remote_code=config.model.trust_remote_code)
    own_ids, stop_texts = split_stops(tokenizer, config.rollout.stop)
    stop_ids = stop_token_ids(tokenizer, generation_config) | own_ids
    if plan.room is not None:
        return build_vllm_engine(config, folder, tokenizer, stop_ids, stop_texts, ranks, plan.room)
    if config.rollout.engine == "vllm_server":
        return VllmServerEngine.connect(config, tokenizer, stop_ids, stop_texts, ranks)
    replica = load_causal_lm(
        folder,
        dtype=config.sampler_dtype,
        trust_remote_code=config.model.trust_remote_code,
        attn_implementation=config.model.attn_implementation,
        device=ranks.device,
    )
    return TransformersEngine(
        replica,
        tokenizer,
        max_sequences=config.rollout.max_sequences,
        stop_ids=stop_ids,
        stop_texts=stop_texts,
        sleep=config.sampler_sleeps,
    )


def _start_trackers(plan: Plan, ranks: Ranks) -> Trackers:
    config = plan.config
    if not ranks.is_main or not config.logging.trackers:
        return Trackers()
    return Trackers.start(
        config.logging.trackers,
        project=config.logging.project,
        run_dir=plan.run_dir,
        config=_flatten(dataclasses.asdict(config)),
        cpu=ranks.device.type == "cpu",
    )


def _open_run_folder(plan: Plan, progress: Progress, ranks: Ranks) -> RunWriter:
    description: dict[str, Any] = {
        # A run of its own that takes this file for its recipe is not to go on with this one.
        "config_yaml": dump_config(dataclasses.replace(plan.config, resume=None)),
        "ds_config": plan.ds_config,
        "environment": describe_environment(world_size=ranks.world_size),
    }
    if not (plan.run_dir / "config.yaml").exists():
        return RunWriter.create(plan.run_dir, **description)
    writer = RunWriter.resume(plan.run_dir, progress.step)
    writer.write_description(**description)
    return writer
