"""One vLLM server over HTTP: what can be asked of it, and what it means when it does not answer.

The servers are started by `scripts/serve.py`: their development endpoints (weights in, calls on the workers) are open
and carry no password, which is why they are bound to this machine unless told otherwise. Every call opens a connection
of its own, since a kept one may be closed by the server in the moment in which it is used again, which looks like a
death. Layer L2, imports requests and no vLLM.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import requests
from transformers import PreTrainedConfig

from clipo_ds.schema import TrainConfig
from clipo_ds.shared_memory import SHARED_MEMORY, shared_folder
from clipo_ds.threads import run_beside
from clipo_ds.types import InputError, Rollout

CONNECT_TIMEOUT_S = 10.0
HOW_TO_START = "start it by `python scripts/serve.py`"


class ServerDied(Exception):
    """A server does not answer, or not in time; the message begins with its URL."""


class ServerLate(ServerDied):
    """A server did not answer in time."""


class ServerError(Exception):
    """A server answered that it failed; the message begins with its URL and holds the server's own words."""


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself."""

    host: str
    transfer: str | None  # vLLM's weight-transfer backend
    model: str  # as vLLM was given it
    dtype: str
    max_model_len: int  # tokens of prompt and response together
    logprobs_mode: str
    world_size: int  # workers of all parallel groups
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    shares_memory: bool  # it could read a file that was written into SHARED_MEMORY here


@dataclass(frozen=True)
class SamplingRequest:
    """What all prompts of one `generate` have in common."""

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: Sequence[int]
    stop_texts: Sequence[str] = ()


class ServerClient:
    """Calls on one server.

    Args:
        url: `http://HOST:PORT`.
        request_timeout_s: Longest wait for the responses to one prompt, seconds.
    """

    def __init__(self, url: str, request_timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self.request_timeout_s = request_timeout_s

    def call(self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float, get: bool = False) -> Any:
        """One request; the JSON of the answer, None for an empty one.

        Raises:
            ServerDied: No connection; as `ServerLate`, no answer in time.
            ServerError: The answer is an error.
        """
        with requests.Session() as session:
            session.trust_env = False  # a proxy for the internet is none for the machine beside this one
            try:
                answer = session.request(
                    "GET" if get else "POST",
                    f"{self.url}/{path}",
                    json=body,
                    timeout=(min(CONNECT_TIMEOUT_S, timeout_s), timeout_s),
                )
            except requests.Timeout:
                raise ServerLate(f"{self.url} did not answer /{path} within {timeout_s:.0f} s") from None
            except requests.RequestException as error:
                raise ServerDied(f"{self.url} does not answer ({_reason(error)})") from None
        if not answer.ok:
            raise ServerError(f"{self.url} answered /{path} with {answer.status_code}: {_error_text(answer)}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise ServerError(f"{self.url} answered /{path} with what is no JSON: {answer.text[:200]!r}") from None

    def complete(self, prompt: Sequence[int], request: SamplingRequest, seed: int) -> list[Rollout]:
        """Sample `request.group_size` responses to a prompt; rollout k gets the seed `seed` + k. Texts are empty.

        Raises:
            ServerDied: As `call`, or the server gave the prompt up.
            ServerError: As `call`.
            FloatingPointError: A log-probability is not finite.
        """
        answer = self.call(
            "v1/completions",
            {
                "prompt": list(prompt),
                "n": request.group_size,
                "max_tokens": request.max_new_tokens,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "top_k": request.top_k,
                # Said although they are vLLM's defaults: a server takes others from the model's generation config.
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "stop_token_ids": list(request.stop_token_ids),
                "stop": list(request.stop_texts),
                "include_stop_str_in_output": True,
                "seed": seed,
                "logprobs": 0,  # of the sampled token alone
                "return_token_ids": True,
            },
            timeout_s=self.request_timeout_s,
        )
        return [self._rollout(choice) for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]

    def score(self, token_ids: Sequence[int], start: int) -> list[float]:
        """Log-probabilities of the given tokens from position `start` on, each after those before it.

        Raises:
            ServerDied: As `call`.
            ServerError: As `call`.
        """
        body = {"prompt": list(token_ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self.call("v1/completions", body, timeout_s=self.request_timeout_s)
        ranked = answer["choices"][0]["prompt_logprobs"][start:]
        return [entry[str(token)]["logprob"] for token, entry in zip(token_ids[start:], ranked, strict=True)]

    def _rollout(self, choice: Mapping[str, Any]) -> Rollout:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerDied(f"{self.url} gave a prompt up ({choice['finish_reason']})")
        logprobs = choice["logprobs"]["token_logprobs"]
        # vLLM writes -9999 where the log-probability is lower or -inf; JSON has no NaN.
        if any(p is None or not -9999 < p <= 1e-3 for p in logprobs):
            raise FloatingPointError(
                f"the log-probabilities of {self.url} are not finite: the weights that it was given are broken"
            )
        return Rollout(tuple(choice["token_ids"]), tuple(logprobs), "", choice["finish_reason"] == "length")

    def describe(self, timeout_s: float = CONNECT_TIMEOUT_S) -> ServerFacts:
        """What the server runs, and whether it reads this machine's memory.

        Raises:
            ServerDied: As `call`.
            ServerError: As `call`; so answers a vLLM server that `scripts/serve.py` did not start.
        """
        token = uuid.uuid4().hex
        with shared_folder() as folder:
            probe = folder / "probe"
            probe.write_text(token)
            body = {"method": "clipo_ds_describe", "kwargs": {"probe": str(probe)}}
            facts = self.call("collective_rpc", body, timeout_s=timeout_s)["results"][0]
        return ServerFacts(shares_memory=facts.pop("probe") == token, **facts)

    def is_alive(self) -> bool:
        """Whether the server says that it is well."""
        try:
            self.call("health", get=True, timeout_s=CONNECT_TIMEOUT_S)
        except (ServerDied, ServerError):
            return False
        return True

    def weight_version(self) -> str:
        """The version that the last finished update of the weights was given.

        Raises:
            ServerDied: As `call`.
            ServerError: As `call`.
        """
        return str(self.call("weight_info", get=True, timeout_s=CONNECT_TIMEOUT_S)["weight_version"])


def connect(config: TrainConfig) -> list[ServerClient]:
    """A client a server, in the order of `rollout.server.urls`."""
    return [ServerClient(url, config.rollout.server.request_timeout_s) for url in config.rollout.server.urls]


def check_servers(config: TrainConfig, model: PreTrainedConfig, *, on_gpu: bool, sends: bool) -> None:
    """Check that every server is there and can serve this run.

    Args:
        config: The run's.
        model: Configuration of the model to train.
        on_gpu: Whether the trainer has GPUs, between which weights can go.
        sends: Whether this process is the one that sends weights.

    Raises:
        InputError: In one line, the field, the server, and what would be right.
    """
    clients = connect(config)
    for asked in run_beside([partial(_problem_of, client, config, model, on_gpu, sends) for client in clients]):
        if (problem := asked.result()) is not None:
            raise InputError(problem)


def _problem_of(
    client: ServerClient, config: TrainConfig, model: PreTrainedConfig, on_gpu: bool, sends: bool
) -> str | None:
    url, text = client.url, model.get_text_config()
    try:
        facts = client.describe()
    except ServerDied as error:
        return f"`rollout.server.urls` must be servers that are running, got {error}; {HOW_TO_START}"
    except (ServerError, ValueError, KeyError, TypeError) as error:
        return (
            f"`rollout.server.urls` must be vLLM servers with this package's extension, got {url}, which lacks it "
            f"({str(error).removeprefix(url).strip()}); {HOW_TO_START}"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(facts, name) != getattr(text, name):
            return (
                f"`rollout.server.urls` must serve the model of `model.path` ({config.model.path}, {name} "
                f"{getattr(text, name)}), got {url} with {facts.model}, {name} {getattr(facts, name)}"
            )
    longest = config.data.max_prompt_tokens + config.longest_response
    if facts.max_model_len < longest:
        return (
            f"`rollout.max_new_tokens` + data.max_prompt_tokens must fit the context of {url} "
            f"(--max-model-len {facts.max_model_len}), got {longest}"
        )
    if config.sampler_dtype != facts.dtype:
        return (
            f"`rollout.dtype` must be that of {url} ({facts.dtype}), got {config.rollout.dtype!r}"
            f"{f', which is {config.sampler_dtype}' if config.rollout.dtype == 'auto' else ''}"
        )
    if facts.logprobs_mode != "raw_logprobs":
        return (
            f"`rollout.server.urls` must serve with --logprobs-mode raw_logprobs, got {url} with {facts.logprobs_mode}"
        )
    if facts.transfer == "nccl":
        if not on_gpu:
            return (
                f"`rollout.server.urls` must take weights from files when the trainer has no GPU, got {url} with nccl"
            )
        if sends and importlib.util.find_spec("vllm") is None:
            return (
                f"`rollout.server.urls` must take weights from files where vLLM is not installed, got {url} with nccl"
            )
    elif facts.transfer != "clipo_ds_files":
        return f"`rollout.server.urls` must take weights, got {url} with the backend {facts.transfer}; {HOW_TO_START}"
    elif sends and not facts.shares_memory:
        return (
            f"`rollout.server.urls` must be on the trainer's own machine to take weights from files in "
            f"{SHARED_MEMORY}, got {url} on {facts.host}, which cannot read them"
        )
    return None


def _error_text(answer: requests.Response) -> str:
    """The server's own words: the message of its JSON error, or the last line of whatever it sent."""
    try:
        body = answer.json()
        error = body.get("error", body.get("detail", body))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = answer.text
    # What vLLM wraps around the error of a worker.
    text = text.removeprefix("Call to collective_rpc method failed: ")
    text = text.removesuffix(", please check the stack trace above for the root cause")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else answer.reason


def _reason(error: BaseException) -> str:
    """What is at the bottom of a chain of errors, in a few words."""
    seen: BaseException | None = error
    while seen is not None:
        error = seen
        inner = getattr(seen, "reason", None) or next((a for a in seen.args if isinstance(a, BaseException)), None)
        seen = inner if isinstance(inner, BaseException) else seen.__cause__ or seen.__context__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
