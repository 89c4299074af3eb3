"""vLLM as a rollout engine, inside the DeepSpeed ranks: one engine a rank, or one a group of ranks.

`clipo_ds.vllm_checks` finds what cannot work before any weight is loaded, `build_vllm_engine` makes the engine of a
run. Layer L2; vLLM itself is imported inside functions, since it is optional and takes seconds.

How it is held together: `external_launcher` makes vLLM a guest of the processes that the launcher started, with its
scheduler in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`). With tensor parallelism every rank of a group is given
the same requests in the same order, the group's prompts one after the other, and keeps the results of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipo_ds.distributed import Ranks
from clipo_ds.generation import check_arguments, raise_wrong_weights
from clipo_ds.models import base_folder, weight_shapes
from clipo_ds.sampling import rollout_seed
from clipo_ds.schema import TrainConfig
from clipo_ds.thoughts import response_decoder
from clipo_ds.turns import spoken_ids, until_stop
from clipo_ds.types import Group, Prompt, Rollout
from clipo_ds.vllm_loading import reload_weights
from clipo_ds.vllm_room import VllmRoom

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

MIN_BATCHED_TOKENS = 8192
"""Tokens of one of vLLM's batches, at least. On a CPU it cannot take back the random numbers of a prompt that was
prefilled in part ("CPU Generator does not use offset"), and a seeded request in a prefill over several steps kills the
engine: prompts are prefilled whole there, and a batch must hold the longest."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # sizes that vLLM has room for


class VllmEngine:
    """Samples with vLLM; the weights come through `load_weights`, and until then they are random.

    The reported log-probabilities are those of the tokens drawn, under the full softmax at temperature 1, whatever the
    sampling temperature and filters were (vLLM's `raw_logprobs`).

    Args:
        folder: Model folder or Hub id; only configuration is read from it, unless `lora_rank` is given.
        tokenizer: Decodes responses.
        stop_ids: Tokens that end a response.
        stop_texts: Texts that end a response, as those of `TransformersEngine`.
        thought_tags: `data.thought_tags`; responses keep those of them that are special tokens.
        dtype: Precision of the weights, `float32` or `bfloat16`.
        max_model_len: Longest prompt and response together, tokens.
        max_sequences: Rollouts decoded at once.
        kv_cache_bytes: Size of the KV cache; None is what `memory_share` leaves.
        memory_share: Share of the device's memory for weights and KV cache.
        eager: Do not compile.
        tensor_parallel: Consecutive ranks that hold this engine together; all of them make it.
        sleep: Let `sleep` free the device's memory.
        lora_rank: Hold the base weights that are in `folder`, for adapters of at most this rank.
        trust_remote_code: Let model code that comes with the weights run.
    """

    takes_original_names = True

    def __init__(
        self,
        folder: str,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        *,
        stop_texts: Sequence[str] = (),
        dtype: str,
        max_model_len: int,
        max_sequences: int = 256,
        kv_cache_bytes: int | None = None,
        memory_share: float = 0.3,
        eager: bool = True,
        tensor_parallel: int = 1,
        sleep: bool = False,
        lora_rank: int | None = None,
        trust_remote_code: bool = False,
        thought_tags: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._text_of = response_decoder(tokenizer, thought_tags)
        self.max_model_len = max_model_len
        self.stop_ids = frozenset(stop_ids)
        self.stop_texts = tuple(stop_texts)
        self._shapes = weight_shapes(folder, trust_remote_code=trust_remote_code)
        self._tensor_parallel = tensor_parallel
        self._sleeps = sleep
        self._adapter: LoRARequest | None = None
        set_environment()
        from vllm import LLM

        options: dict[str, Any] = {}
        if lora_rank is not None:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room_for(lora_rank)}
        if not torch.cuda.is_available():
            batched = max(MIN_BATCHED_TOKENS, max_model_len, max_sequences)
            if lora_rank is not None:
                # For every token of a batch vLLM's adapters on a CPU copy both factors, gigabytes where it is large.
                batched = max_model_len + max_sequences
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": batched}
        with _process_state_kept():
            self._llm = LLM(
                base_folder(folder),
                dtype=dtype,
                # Weights arrive with the first sync; only a base that never changes is read from the folder.
                load_format="dummy" if lora_rank is None else "auto",
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="raw_logprobs",
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=tensor_parallel,
                max_model_len=max_model_len,
                max_num_seqs=max_sequences,
                kv_cache_memory_bytes=kv_cache_bytes,
                gpu_memory_utilization=memory_share,
                enforce_eager=eager,
                enable_sleep_mode=sleep,
                trust_remote_code=trust_remote_code,
                seed=0,
                **options,
            )
        # It looks for texts in what it has decoded; nothing else of it needs a tokenizer.
        self._llm.llm_engine.output_processor.tokenizer = tokenizer
        # What vLLM does when it is collected ends the default process group as well, which is the trainer's.
        self._llm.llm_engine.engine_core._finalizer.detach()

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int,
    ) -> list[Group]:
        """As `TransformersEngine.generate`, the uniforms apart; with tensor parallelism called by the whole group.

        Raises:
            ValueError: An argument is out of its range, a prompt has no tokens, or one does not fit the context.
            FloatingPointError: The logits are not finite.
        """
        check_arguments(prompts, group_size, max_new_tokens, temperature, top_p, top_k)
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        if longest + max_new_tokens > self.max_model_len:
            raise ValueError(
                f"`rollout.vllm.max_model_len` must be at least {longest + max_new_tokens} for a prompt of {longest} "
                f"tokens and {max_new_tokens} new ones, got {self.max_model_len}"
            )
        everyone, own = self._gather(prompts)
        if not everyone:
            return []
        from vllm import SamplingParams

        settings = {
            "n": 1, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
            "logprobs": 0, "stop_token_ids": sorted(self.stop_ids), "ignore_eos": True,
            "detokenize": bool(self.stop_texts), "stop": list(self.stop_texts), "include_stop_str_in_output": True,
        }  # fmt: skip
        requests = [(prompt, k) for prompt in everyone for k in range(group_size)]
        # vLLM draws from the global generator although each request has its own seed.
        with torch.random.fork_rng(devices=_generators()):
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt.token_ids)} for prompt, _ in requests],
                [SamplingParams(**settings, seed=rollout_seed(seed, prompt.uid, k)) for prompt, k in requests],
                use_tqdm=False,
                lora_request=self._adapter,
            )
        kept = outputs[own.start * group_size : own.stop * group_size]
        rollouts = [self._rollout(output.outputs[0]) for output in kept]
        return [
            Group(prompt, tuple(rollouts[p * group_size : (p + 1) * group_size])) for p, prompt in enumerate(prompts)
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a whole set of weights into vLLM's model; the iterator is always run to its end.

        Args:
            weights: Names of the model's published folder and tensors of any float dtype and device, layer by layer,
                tied weights under each of their names.

        Raises:
            RuntimeError: A name is unknown, a shape differs, or a weight was left out; the sampler's model is then a
                mixture of old and new weights.
        """
        wrong: list[str] = []
        stream = self._checked(weights, wrong)
        left_out: list[str] = []
        try:
            (left_out,) = self._llm.collective_rpc(reload_weights, args=(stream,))
        finally:
            for _ in stream:  # on the other side of it ranks gather weights together
                pass
        self._llm.reset_prefix_cache()
        # What transformers calls a weight and vLLM does not know under that name is passed over by some of its models.
        raise_wrong_weights(wrong or [f"{name} of vLLM's model was left out" for name in left_out])

    def sleep(self) -> None:
        """Move the weights to the CPU's memory and drop the KV cache, where the engine was made to."""
        if self._sleeps:
            self._llm.sleep(level=1)

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._sleeps:
            self._llm.wake_up()

    def close(self) -> None:
        """End vLLM and its process groups, before those of the run end; the engine cannot be used afterwards."""
        from vllm.distributed import parallel_state

        core = self._llm.llm_engine.engine_core.engine_core
        core.structured_output_manager.clear_backend()
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        del self._llm
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None

    def _gather(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], range]:
        """The prompts of all ranks of the tensor-parallel group, and the positions of this rank's among them."""
        if self._tensor_parallel == 1:
            return list(prompts), range(len(prompts))
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        shares: list[list[Prompt]] = [[] for _ in range(group.world_size)]
        dist.all_gather_object(shares, list(prompts), group=group.cpu_group)
        start = sum(map(len, shares[: group.rank_in_group]))
        return [prompt for share in shares for prompt in share], range(start, start + len(prompts))

    def _rollout(self, completion: Any) -> Rollout:
        ids = tuple(completion.token_ids)
        logprobs = tuple(float(row[token].logprob) for token, row in zip(ids, completion.logprobs, strict=True))
        if not all(map(math.isfinite, logprobs)):
            raise FloatingPointError("the sampler's logits are not finite: the weights that it was given are broken")
        text, stopped = until_stop(self._text_of(spoken_ids(ids, self.stop_ids)), self.stop_texts)
        return Rollout(ids, logprobs, text, ids[-1] not in self.stop_ids and not stopped)

    def _checked(self, weights: Iterable[tuple[str, Tensor]], wrong: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Copies of the weights, since vLLM keeps them until a layer is whole; says in `wrong` what is not right."""
        missing = dict(self._shapes)
        for name, tensor in weights:
            shape = missing.pop(name, None)
            if shape is None:
                wrong.append(f"{name} is not a parameter of the sampler's model")
            elif shape != tensor.shape:
                wrong.append(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
            else:
                yield name, tensor.detach().clone()
        wrong += [f"{name} was left out" for name in missing]


class VllmAdapterEngine(VllmEngine):
    """vLLM with the base weights of a LoRA policy; `sync_weights` sends it the adapter alone."""

    def load_adapter(self, folder: Path) -> None:
        """Take a PEFT folder's adapter in place of the last one.

        Raises:
            RuntimeError: vLLM did not take the adapter.
        """
        from vllm.lora.request import LoRARequest

        last = self._adapter
        number = 1 if last is None else last.lora_int_id + 1  # a known number would not be read again
        if last is not None:
            self._llm.llm_engine.remove_lora(last.lora_int_id)
        self._adapter = LoRARequest(f"sync {number}", number, str(folder))
        if not self._llm.llm_engine.add_lora(self._adapter):
            raise RuntimeError(f"weight sync failed: vLLM did not take the adapter of sync {number}")
        self._llm.reset_prefix_cache()


# -- a run's engine ----------------------------------------------------------------------------------------------------


def build_vllm_engine(
    config: TrainConfig,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Iterable[int],
    stop_texts: Sequence[str],
    ranks: Ranks,
    room: VllmRoom,
) -> VllmEngine:
    """The engine of a run that `check_vllm` has found possible; called by all ranks."""
    options = config.rollout.vllm
    on_cpu = ranks.device.type == "cpu"
    adapter = options.lora == "adapter" and config.model.lora is not None
    return (VllmAdapterEngine if adapter else VllmEngine)(
        folder,
        tokenizer,
        stop_ids,
        stop_texts=stop_texts,
        dtype=config.sampler_dtype,
        max_model_len=room.max_model_len,
        max_sequences=config.rollout.max_sequences,
        kv_cache_bytes=room.kv_cache_bytes,
        memory_share=options.memory_share,
        eager=on_cpu if options.eager is None else options.eager,
        tensor_parallel=options.tensor_parallel,
        sleep=config.sampler_sleeps and not on_cpu,
        lora_rank=config.model.lora.rank if adapter else None,
        trust_remote_code=config.model.trust_remote_code,
        thought_tags=config.data.thought_tags,
    )


def _room_for(rank: int) -> int:
    return next((size for size in LORA_RANKS if size >= rank), rank)


# -- vLLM as a guest ---------------------------------------------------------------------------------------------------


def set_environment() -> None:
    """What vLLM reads when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # It warns of buffers that no weight belongs to at every sync, and of the tokenizer that it is not given.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def _generators() -> list[int]:
    """The devices whose random numbers are the trainer's, beside the CPU."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """Undo what vLLM's start does to the process: seeds, libraries for child processes, torch's thread setting."""
    preload = os.environ.get("LD_PRELOAD")
    numbers, array = random.getstate(), np.random.get_state()
    set_num_threads = torch.set_num_threads
    try:
        with torch.random.fork_rng(devices=_generators()):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(numbers)
        np.random.set_state(array)
        os.environ.pop("LD_PRELOAD", None)
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload
