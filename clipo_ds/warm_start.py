"""The small model of the built-in task: made from a transformers config, taught on noisy solutions, cached.

`warm_start(task)` gives an ordinary Hugging Face folder (config, safetensors, tokenizer) that every other part of the
program loads like any model. It is a Llama of about half a million parameters with tied embeddings and one token a
character, trained in float32 on the CPU with one thread, so that the same task gives the same model on one machine.

The cache is `$CLIPO_DS_CACHE`, by default `~/.cache/clipo_ds`; the folder's name carries a hash of everything that the
weights depend on. It is written beside and renamed, so that it is whole or absent and any number of processes may
ask at once. Layer L1: imports torch and transformers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clipo_ds.arithmetic import CHARACTERS, max_lengths, warm_start_examples
from clipo_ds.cores import one_core
from clipo_ds.schema import TaskConfig

logger = logging.getLogger(__name__)

VERSION = 1
"""Part of the cache's key: raise it with every change that makes other weights out of the same task."""
PAD, EOS = "<pad>", "</s>"
IGNORED = -100  # label of tokens that are not learnt: prompts and padding
HEAD_SIZE = 32
WARMUP_SHARE = 0.05  # of the steps, over which the learning rate rises
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
LOG_EVERY = 100  # steps
BATCHES_PER_POOL = 8  # batches whose examples are sorted by length among them, so that little padding is computed

_WITHOUT_INFLUENCE = ("num_train_prompts", "num_test_prompts")
"""Fields of the task that the weights do not depend on: which problems are held out is settled problem by problem."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer: one token for each of `CHARACTERS`, padding and end of sequence; no token in between.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer("7+5:")["input_ids"], tokenizer.decode([9, 12, 7, 17, 1], skip_special_tokens=True)
    ([9, 12, 7, 17], '7+5:')
    """
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(task: TaskConfig) -> LlamaForCausalLM:
    """The untrained model, float32; its weights depend on `task.seed` alone, and the global generator is left alone."""
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=task.hidden_size,
        intermediate_size=2 * task.hidden_size,
        num_hidden_layers=task.num_layers,
        num_attention_heads=task.hidden_size // HEAD_SIZE,
        num_key_value_heads=task.hidden_size // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        max_position_embeddings=max(256, 2 * sum(max_lengths(task, harder=True))),
        tie_word_embeddings=True,
        initializer_range=task.hidden_size**-0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
    return model


def cache_root() -> Path:
    """Where warm-started models are kept."""
    return Path(os.environ.get("CLIPO_DS_CACHE") or Path.home() / ".cache" / "clipo_ds").expanduser()


def cache_path(task: TaskConfig) -> Path:
    """The folder of a task's model, which need not exist yet."""
    settings = {name: value for name, value in asdict(task).items() if name not in _WITHOUT_INFLUENCE}
    text = json.dumps({"version": VERSION, **settings}, sort_keys=True)
    return cache_root() / f"arithmetic-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def warm_start(task: TaskConfig) -> Path:
    """The folder of the task's small model; made now if the cache does not hold it (about two minutes by default).

    Processes that ask at the same time wait for the first one, which makes the model.
    """
    folder = cache_path(task)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _make(task, folder)
    return folder


def _make(task: TaskConfig, folder: Path) -> None:
    logger.info("making the small arithmetic model once, in %s", folder)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as beside:
        whole = Path(beside) / "model"
        with one_core():  # the weights do not depend on the number of cores
            model = train_supervised(task)
        model.save_pretrained(whole)
        build_tokenizer().save_pretrained(whole)
        (whole / "task.json").write_text(json.dumps({"version": VERSION, **asdict(task)}, indent=2) + "\n")
        whole.rename(folder)


def train_supervised(task: TaskConfig) -> LlamaForCausalLM:
    """Teach a fresh model the task's worked solutions: next-token cross-entropy over response tokens, AdamW, cosine."""
    model = build_model(task)
    tokenizer = build_tokenizer()
    steps, peak = task.warm_start_steps, task.warm_start_learning_rate
    warmup = max(1, round(WARMUP_SHARE * steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    batches = _batches(task)
    began = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * _schedule(step, warmup, steps)
        input_ids, labels = _collate(next(batches), tokenizer)
        # Padding stands to the right of what it could disturb, so the causal mask is all that is needed.
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            logger.info("warm start %d/%d, loss %.3f, %.0f s", step + 1, steps, loss.item(), seconds)
    return model.eval()


def _schedule(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate: a linear rise, then half a cosine down to 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(task: TaskConfig) -> Iterator[list[tuple[str, str]]]:
    """Batches of (prompt, response) of about one length each, in random order."""
    examples, size = warm_start_examples(task), task.warm_start_batch_size
    rng = Random(f"{task.seed}/batches")
    while True:
        pool = sorted(islice(examples, size * BATCHES_PER_POOL), key=lambda pair: len(pair[0]) + len(pair[1]))
        starts = list(range(0, len(pool), size))
        rng.shuffle(starts)
        yield from (pool[start : start + size] for start in starts)


def _collate(examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels, (B, S) each, padded on the right; prompts and padding carry no label."""
    prompts = tokenizer([prompt for prompt, _ in examples])["input_ids"]
    responses = tokenizer([response + EOS for _, response in examples])["input_ids"]
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = input_ids[row, len(prompt) : end]
    return input_ids, labels
