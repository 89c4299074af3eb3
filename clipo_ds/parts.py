"""From a configuration to the parts of a run: everything is checked first, then everything is built.

`preflight` reads and checks whatever the user gave (DeepSpeed file, model folder, tokenizer, data, reward functions,
run folder) without loading a weight or writing into it. `build_parts` then loads, builds and, when resuming, restores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from clipo_ds import checkpoint, distributed
from clipo_ds.ahead import Ahead
from clipo_ds.checkpoint import Progress
from clipo_ds.checks import check_ds_config, check_model
from clipo_ds.config import dump_config, read_ds_config
from clipo_ds.contrastive import ContrastiveHead
from clipo_ds.contrastive_term import ContrastiveTerm, load_head
from clipo_ds.data import PromptOrder
from clipo_ds.display import Display
from clipo_ds.distributed import Ranks
from clipo_ds.environment import describe_environment
from clipo_ds.generation import RolloutEngine, TransformersEngine
from clipo_ds.loading import Data, load_data, on_every_rank
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
from clipo_ds.resuming import check_data, check_same_settings, find_run_folder
from clipo_ds.rewards import Judge, LoadedFunction, load_functions
from clipo_ds.run_folder import RunFolder
from clipo_ds.schema import TrainConfig
from clipo_ds.shared_memory import remove_left_folders
from clipo_ds.start_check import check_policy
from clipo_ds.thoughts import thought_tags
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
    prompts: Sequence[Prompt]
    tests: dict[str, Sequence[Prompt]]
    data: dict[str, Any]  # what the prompts are, as checkpoints record it
    changed: list[str]  # what has become of the data since the checkpoint to go on from, in words
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
    prompts: Sequence[Prompt]
    order: PromptOrder
    tests: dict[str, Sequence[Prompt]]
    data: dict[str, Any]  # what the prompts are, as checkpoints record it
    run_dir: Path
    folder: RunFolder
    writer: RunWriter | None  # on rank 0
    display: Display
    trackers: Trackers
    progress: Progress
    ahead: Ahead | None  # with rollout.async_steps
    stop_requested: bool = False
    is_between_steps: bool = True  # False: the weights are those of a step that failed in the middle of its update

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
    check_same_settings(config, distributed.broadcast_object(config), ranks)
    config = choose_engine(config, ranks)
    fresh_name = f"{Path(config.recipe or 'run').stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir, resume_from = distributed.from_main(lambda: find_run_folder(config, fresh_name))
    checked = on_every_rank(ranks, lambda: _check(config, ranks, run_dir, resume_from))
    data = load_data(config, checked.model.tokenizer, ranks)
    return on_every_rank(ranks, lambda: _plan(config, ranks, checked, data))


@dataclass(frozen=True)
class _Checked:
    """What has passed the checks that need no data."""

    spec: ObjectiveSpec
    ds_config: dict[str, Any]
    model: ModelFacts
    run_dir: Path
    resume_from: Path | None
    functions: dict[str, LoadedFunction]


def _check(config: TrainConfig, ranks: Ranks, run_dir: Path, resume_from: Path | None) -> _Checked:
    """Check what needs no data, or raise the error of this rank; no rank waits for another in here."""
    if config.ds_config is None:
        raise InputError("`ds_config` must be a DeepSpeed JSON file (--ds_config ds_configs/zero3.json), got nothing")
    ds_config = read_ds_config(config.ds_config, ranks.world_size, config)
    if config.rollout.prompts_per_step < ranks.world_size:
        raise InputError(
            f"`rollout.prompts_per_step` must be at least the number of ranks ({ranks.world_size}), "
            f"got {config.rollout.prompts_per_step}"
        )
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
    return _Checked(spec, ds_config, facts, run_dir, resume_from, functions)


def _plan(config: TrainConfig, ranks: Ranks, checked: _Checked, data: Data) -> Plan:
    """What `preflight` gives, or the error of this rank; no rank waits for another in here."""
    for function in checked.functions.values():
        function.check_columns(data.prompts)
    facts = checked.model
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
        room = check_vllm(config, facts.config, ranks, data.longest_prompt)
    if config.rollout.engine == "vllm_server":
        check_servers(config, facts.config, on_gpu=ranks.device.type != "cpu", sends=ranks.is_main)
    return Plan(
        config,
        checked.spec,
        checked.ds_config,
        facts,
        data.prompts,
        data.tests,
        data.digests,
        check_data(config, checked.resume_from, data.digests),
        checked.run_dir,
        checked.resume_from,
        room,
    )


def build_judge(config: TrainConfig, spec: ObjectiveSpec, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """The judge with the objective's default for the overlong penalty filled in."""
    cap = config.rollout.max_new_tokens
    buffer = config.reward.overlong_buffer
    return Judge(
        config.reward,
        overlong_buffer=int(spec.overlong_fraction * cap) if buffer is None else buffer,
        max_new_tokens=cap,
        tags=thought_tags(config.data.thought_tags, tokenizer.chat_template),
    )


def build_parts(plan: Plan, ranks: Ranks) -> Parts:
    """Take the run folder, load and build everything, restore it when resuming; called by all ranks.

    The folder keeps what is in it until all is built; then what a resumed run makes again is moved aside.

    Raises:
        InputError: Another run has the folder by now, or as `start_check.check_policy`.
    """
    config = plan.config
    with contextlib.ExitStack() as when_failing:
        run_folder = RunFolder.take(config, plan.run_dir, plan.resume_from, ranks)
        when_failing.callback(run_folder.release)
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
        check_policy(policy, config.model)
        term = None
        if config.contrastive is not None:
            term = ContrastiveTerm(config.contrastive, policy.hidden_size, config.seed, ranks)
        progress = Progress(step=0, prompts_drawn=0)
        if plan.resume_from is not None:
            progress = checkpoint.load_checkpoint(plan.resume_from, policy, term, ranks)
        engine = _build_engine(plan, folder, ranks)
        when_failing.callback(engine.close)
        sync_weights(policy.model, engine)
        display = Display(config.logging, config.steps, enabled=ranks.is_main)
        judge = build_judge(config, plan.spec, plan.model.tokenizer)
        when_failing.callback(judge.close)
        description = _description(plan, ranks) if ranks.is_main else {}
        is_new = run_folder.begin(description)
        trackers = _start_trackers(plan, run_folder.path, ranks)
        when_failing.callback(trackers.finish)
        if not is_new:
            moved = run_folder.go_on(progress.step, description)
            if moved is not None:
                display.say(f"going on after step {progress.step}: {moved} of later steps moved to {moved.folder}")
        for what in plan.changed:
            display.say(f"warning: {what}")
        display.say(f"run folder {run_folder.path}")
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
        data=plan.data,
        run_dir=run_folder.path,
        folder=run_folder,
        writer=RunWriter(run_folder.path) if ranks.is_main else None,
        display=display,
        trackers=trackers,
        progress=progress,
        ahead=Ahead(engine) if config.rollout.async_steps else None,
    )


def close_parts(parts: Parts) -> None:
    """End worker processes, trackers and vLLM, and give the run folder back."""
    with contextlib.ExitStack() as closing:  # each of them, also where one fails; the last one first
        for close in (parts.folder.release, parts.trackers.finish, parts.judge.close, parts.engine.close):
            closing.callback(close)


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys.

    >>> _flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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
        thought_tags=config.data.thought_tags,
    )


def _start_trackers(plan: Plan, run_dir: Path, ranks: Ranks) -> Trackers:
    config = plan.config
    if not ranks.is_main or not config.logging.trackers:
        return Trackers()
    return Trackers.start(
        config.logging.trackers,
        project=config.logging.project,
        run_dir=run_dir,
        config=_flatten(dataclasses.asdict(config)),
        cpu=ranks.device.type == "cpu",
    )


def _description(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    # A run of its own that takes this file for its recipe is not to go on with this one, and what was allowed once is
    # not allowed for ever.
    config = dataclasses.replace(
        plan.config, resume=None, data=dataclasses.replace(plan.config.data, allow_changed=False)
    )
    changed = {"changed_data": plan.changed} if plan.changed else {}
    return {
        "config_yaml": dump_config(config),
        "ds_config": plan.ds_config,
        "environment": describe_environment(world_size=ranks.world_size) | {"data": plan.data} | changed,
    }
