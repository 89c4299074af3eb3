"""From what a user calls a model to something that transformers loads.

Layer L2: imports torch, transformers and PEFT, and `clipo_ds.warm_start` for the built-in model. A reference is one of

    ORG/NAME        a model on the Hugging Face Hub; a copy in its cache is used where the Hub cannot be reached
    FOLDER          a local model folder, or that of a PEFT adapter, which is merged into its base
    package:NAME    an installed Python package that carries one GGUF file; its weights are unpacked to float32 once
    arithmetic      the small model of the built-in task, warm-started once

`inspect_model` reads configuration and tokenizer and finds the user's mistakes; `materialise_model` makes what has to
be made, in `$CLIPO_DS_CACHE` (by default ~/.cache/clipo_ds), safely for processes that ask at once; `load_causal_lm`
loads the weights.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from clipo_ds import warm_start
from clipo_ds.families import quantisation, unclamp_time_steps, why_refused
from clipo_ds.gguf import PACKAGE, gguf_file, unpack, unpacked_path
from clipo_ds.original_names import original_shapes, saved_buffers
from clipo_ds.schema import TaskConfig
from clipo_ds.turns import turn_end_ids
from clipo_ds.types import InputError

logger = logging.getLogger(__name__)

BUILT_IN = "arithmetic"
HUB_TIMEOUT_S = 10.0
FORMS = "a model folder, a Hugging Face id (`org/name`), `package:NAME` or `arithmetic`"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
# Tokens that published tokenizers reserve for padding or leave unused, so that no model is taught to emit them.
PAD_CANDIDATES = (
    "<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|fim_pad|>",
    "<|reserved_special_token_0|>", "<unused0>", "<|endoftext|>", "<unk>",
)  # fmt: skip
# How adapters start that took a part of the base into their factors, and left the rest for a base. What PEFT loads it
# computes for the first two again, and so merges them; of the others it does not know what the base had become.
MOVED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
FOUND_AGAIN = ("pissa", "olora")
CONVERSION = "save it as plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
# What transformers and the Hub's client raise for a folder or an id that is not a usable model.
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, HTTPError, EntryNotFoundError, StrictDataclassError)


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model without its weights."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase  # with a padding token
    reference: str  # as the user gave it
    adapter: dict[str, Any] | None = None  # the settings of the PEFT adapter that the reference is


def inspect_model(reference: str, *, task: TaskConfig | None = None, trust_remote_code: bool = False) -> ModelFacts:
    """Read a model's configuration and tokenizer, and check that they make a causal language model together.

    Args:
        reference: In one of the forms that the module's docstring lists.
        task: The built-in task, for the reference `arithmetic`.
        trust_remote_code: Let transformers run code that comes with the model.

    Raises:
        InputError: In one line, what is wrong with `model.path`; without loading a weight or waiting for retries.
    """
    if reference == BUILT_IN:
        tokenizer = warm_start.build_tokenizer()
        return ModelFacts(warm_start.build_model(_required(task)).config, tokenizer, reference)
    location, options = _readable(reference)
    options["trust_remote_code"] = trust_remote_code
    base = location
    if (adapter := _adapter_config(location)) is not None:
        base, base_options = _readable_base(adapter, location)
        options |= base_options
        if (start := moved_base(adapter)) is not None and start not in FOUND_AGAIN:
            raise InputError(
                f"`model.path` must be an adapter on a base as it was saved, got {reference!r}, whose start "
                f"({start}) changed the base in a way that nobody can tell from the adapter: {CONVERSION}"
            )
        _require_files(Path(location), ("adapter_model.safetensors", "adapter_model.bin"), "adapter weights", reference)
    config = _read(AutoConfig, base, options, reference, "a model folder that transformers can read")
    _require_causal(config, reference)
    _require_plain_weights(config, reference)
    has_tokenizer = adapter is None or any((Path(location) / name).exists() for name in TOKENIZER_FILES)
    tokenizer = _read(
        AutoTokenizer, location if has_tokenizer else base, options, reference, "a model with a tokenizer"
    )
    _require_vocabulary(tokenizer, config, reference)
    _require_end_token(tokenizer, reference)
    ensure_pad_token(tokenizer)
    return ModelFacts(config, tokenizer, reference, adapter)


def materialise_model(reference: str, *, task: TaskConfig | None = None) -> str:
    """Give a folder or Hub id for `load_causal_lm`, making it first where it has to be made (once, then cached).

    Raises:
        InputError: As `inspect_model`.
    """
    if reference == BUILT_IN:
        return str(warm_start.warm_start(_required(task)))
    if reference.startswith(PACKAGE):
        with _not_partitioned():
            return str(unpack(gguf_file(reference)))
    return _readable(reference)[0]


def load_causal_lm(
    folder: str,
    *,
    dtype: str | torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a whole model in evaluation mode; an adapter is merged into its base in float32 and rounded once.

    Args:
        folder: What `materialise_model` gave.
        dtype: Precision of the weights.
        trust_remote_code: As `inspect_model`.
        attn_implementation: As transformers' `from_pretrained`; None lets it choose.
        device: Where to put it; None leaves it where transformers loads it (partitioned, inside a ZeRO-3 loading
            context).

    Raises:
        InputError: The folder lacks some of the model's weights, which transformers would fill with random numbers.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation}
    adapter = _adapter_config(folder)
    if adapter is None:
        model = _load_whole(folder, dtype, options)
    else:
        base = materialise_model(_base_of(adapter, folder))
        with _not_partitioned():  # an adapter cannot be merged into parts of weights
            model = PeftModel.from_pretrained(_load_whole(base, torch.float32, options), folder).merge_and_unload()
        model = model.to(dtype)
    model = model.eval()
    unclamp_time_steps(model)
    return model if device is None else model.to(device)


def moved_base(adapter: Mapping[str, Any]) -> str | None:
    """How a PEFT adapter began, where that changed the weights of its base too; None for one that left them alone.

    >>> moved_base({"init_lora_weights": "pissa_niter_4"}), moved_base({"init_lora_weights": "gaussian"})
    ('pissa_niter_4', None)
    """
    start = adapter.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(MOVED_BASE) else None


def base_folder(folder: str) -> str:
    """The folder or Hub id that holds a whole model's configuration: an adapter's base, or `folder` itself."""
    adapter = _adapter_config(folder)
    return folder if adapter is None else materialise_model(_base_of(adapter, folder))


def weight_shapes(folder: str, *, trust_remote_code: bool = False) -> dict[str, torch.Size]:
    """Shape of every weight of a model under its folder's names, tied weights under each of them; nothing is loaded."""
    config = AutoConfig.from_pretrained(base_folder(folder), trust_remote_code=trust_remote_code)
    with _not_partitioned(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | saved_buffers(model)
    return original_shapes(model, {name: tensor.shape for name, tensor in tensors.items()})


def read_generation_config(folder: str, *, trust_remote_code: bool = False) -> GenerationConfig:
    """What `load_causal_lm(folder).generation_config` would be, without loading the model."""
    base = base_folder(folder)
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:  # it has none of its own
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code))


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> frozenset[int]:
    """All tokens that end a response: the tokenizer's end of sequence, those of the model's generation config, and what
    the chat template writes after an assistant's turn.

    Chat models often have several (Qwen: <|im_end|> and <|endoftext|>); base models with a template may name one alone.
    """
    named = None if generation_config is None else generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return frozenset(int(i) for i in ids if i is not None) | turn_end_ids(tokenizer)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token one: a reserved token if it has one, its end of sequence otherwise.

    Masks decide what is padding, never the token; still, a token that models do not emit makes mistakes visible.
    """
    if tokenizer.pad_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = [t for t in PAD_CANDIDATES if t in vocabulary and t not in (tokenizer.eos_token, tokenizer.bos_token)]
    chosen = reserved[0] if reserved else tokenizer.eos_token
    tokenizer.pad_token = chosen if chosen is not None else min(vocabulary, key=vocabulary.__getitem__)


# -- references --------------------------------------------------------------------------------------------------------


def _required(task: TaskConfig | None) -> TaskConfig:
    if task is None:
        raise InputError("`task` must be given when `model.path` is 'arithmetic', got nothing")
    return task


def _readable(reference: str) -> tuple[str, dict[str, Any]]:
    """Folder or id, and the options, with which transformers reads configuration and tokenizer."""
    if reference.startswith(PACKAGE):
        file = gguf_file(reference)
        folder = unpacked_path(file)
        return (str(folder), {}) if folder.is_dir() else (str(file.parent), {"gguf_file": file.name})
    folder = Path(reference).expanduser()
    if not folder.exists() and not _looks_local(reference):
        return _hub_location(reference), {}
    if not folder.is_dir():
        raise InputError(f"`model.path` must be {FORMS}, got {reference!r}, which is not a folder that exists")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return str(folder), {}
    if not (folder / "config.json").is_file():
        run = (folder / "config.yaml").is_file() or (folder / "checkpoint.json").is_file()
        hint = "; the model of a run is in checkpoints/step_N/model" if run else ""
        raise InputError(f"`model.path` must be a model folder, got {reference!r}, which has no config.json{hint}")
    _require_files(folder, WEIGHT_FILES, "weights (*.safetensors)", reference)
    return str(folder), {}


def _looks_local(reference: str) -> bool:
    """Whether a name that is no folder was meant as one: it cannot be an id, or its first part is a folder here."""
    first, _, rest = reference.partition("/")
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference) and not reference.startswith(".")
    return not is_id or bool(rest and Path(first).is_dir())


@functools.cache
def _hub_location(repository: str) -> str:
    """The id if the Hub answers for it, the folder of a cached copy if the Hub cannot be reached.

    One short request decides, because transformers' own requests are repeated for half a minute a file.
    """
    cached = try_to_load_from_cache(repository, "config.json")
    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        gated = isinstance(error, GatedRepoError)
        why = (
            "the Hub gives it to accounts with access only (`hf auth login`)" if gated else "the Hub has no such model"
        )
        raise InputError(f"`model.path` must be {FORMS}, got {repository!r}: not a folder, and {why}") from error
    except (HTTPError, OSError) as error:
        if isinstance(cached, str):
            logger.warning("the Hugging Face Hub cannot be reached; using the cached copy of %s", repository)
            return str(Path(cached).parent)
        raise InputError(
            f"`model.path` must be {FORMS}, got {repository!r}: not a folder, and the Hub cannot be reached "
            f"({_first_line(error)})"
        ) from error
    return repository


def _adapter_config(folder: str) -> dict[str, Any] | None:
    path = Path(folder) / "adapter_config.json"
    if not path.is_file() or (Path(folder) / "config.json").is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"`model.path` must be a PEFT adapter with a readable {path}, got {_first_line(error)}"
        ) from error


def _base_of(adapter: dict[str, Any], folder: str) -> str:
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"`model.path` must be an adapter that names its base model, got {folder!r}, which does not")
    return base


def _readable_base(adapter: dict[str, Any], folder: str) -> tuple[str, dict[str, Any]]:
    try:
        return _readable(_base_of(adapter, folder))
    except InputError as error:
        raise InputError(f"{error} (the base model of the adapter {folder!r})") from error


# -- checks ------------------------------------------------------------------------------------------------------------


def _read(kind: Any, location: str, options: dict[str, Any], reference: str, rule: str) -> Any:
    try:
        return kind.from_pretrained(location, **options)
    except LOADING_ERRORS as error:
        if not options.get("trust_remote_code") and "trust_remote_code=True" in str(error):
            raise InputError(
                f"`model.path` must be a model without code of its own, got {reference!r}; read that code, then let it "
                "run (train.py: --model.trust_remote_code true, evaluate.py: --trust_remote_code)"
            ) from error
        raise InputError(f"`model.path` must be {rule}, got {reference!r}: {_first_line(error)}") from error


def _require_files(folder: Path, patterns: tuple[str, ...], what: str, reference: str) -> None:
    if not any(any(folder.glob(pattern)) for pattern in patterns):
        raise InputError(f"`model.path` must be a folder with {what}, got {reference!r} without any")


def _require_causal(config: PreTrainedConfig, reference: str) -> None:
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise InputError(
            f"`model.path` must be a causal language model, got {reference!r}, which is a {config.model_type} model"
        )
    if (why := why_refused(config)) is not None:
        raise InputError(
            f"`model.path` must be a causal language model that this program can train (docs/models.md), got "
            f"{reference!r}, a {config.model_type} model, which {why}"
        )


def _require_plain_weights(config: PreTrainedConfig, reference: str) -> None:
    if (method := quantisation(config)) is not None:
        raise InputError(
            f"`model.path` must be a model with plain weights (float32, bfloat16 or float16), got {reference!r}, "
            f"which is quantised ({method}): take the unquantised model, or write one with its `dequantize()`"
        )


def _require_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, reference: str) -> None:
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    size = config.get_text_config(decoder=True).vocab_size
    if largest < 0:
        raise InputError(f"`model.path` must be a model with a tokenizer, got {reference!r} with an empty vocabulary")
    if largest >= size:
        raise InputError(
            f"`model.path` must be a model whose tokenizer fits its vocabulary of {size} tokens, got {reference!r} "
            f"with the token {token!r} of id {largest}"
        )


def _require_end_token(tokenizer: PreTrainedTokenizerBase, reference: str) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"`model.path` must be a model whose tokenizer has an end-of-sequence token, got {reference!r} without "
            "one; name it as `eos_token` in the `tokenizer_config.json` of a local copy of the model's folder"
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# -- loading -----------------------------------------------------------------------------------------------------------


def _load_whole(folder: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    if Path(folder).is_dir():
        # A bar over the milliseconds that a folder takes to read is noise; the bars of a download stay.
        transformers_logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"`model.path` must be a folder with all weights of the model, got {folder!r} without {len(missing)} of "
            f"them ({missing[0]}, …)"
        )
    return model


@contextlib.contextmanager
def _not_partitioned() -> Iterator[None]:
    """Load models whole inside a context in which transformers partitions them for ZeRO-3."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    settings = None if reference is None else reference()
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            hf_deepspeed.set_hf_deepspeed_config(settings)
