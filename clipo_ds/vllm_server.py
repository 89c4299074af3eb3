"""The rollout engine on vLLM servers: prompts over HTTP as token ids, weights by `vllm_transfer`.

Every rank spreads its prompts over all living servers; rank 0 alone sends weights, while all ranks gather them.
Sampling touches no collective, so that it may run in a thread beside the training of another batch; everything else is
called by all ranks alike. A server that dies ends the run, or its prompts go to the others (`rollout.server.on_death`).
Layer L2.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipo_ds import distributed
from clipo_ds.distributed import Ranks
from clipo_ds.generation import check_arguments
from clipo_ds.sampling import rollout_seed
from clipo_ds.schema import TrainConfig
from clipo_ds.thoughts import response_decoder
from clipo_ds.threads import run_beside
from clipo_ds.turns import spoken_ids, until_stop
from clipo_ds.types import Group, Prompt, Rollout, SamplerLost
from clipo_ds.vllm_client import SamplingRequest, ServerClient, ServerDied, ServerError, ServerLate, connect
from clipo_ds.vllm_transfer import FileTransfer, NcclTransfer, Transfer, send_weights

logger = logging.getLogger(__name__)

MAX_LOST_CONNECTIONS = 3  # of one prompt


class VllmServerEngine:
    """Samples from vLLM servers that run on devices of their own.

    Args:
        clients: One a server.
        tokenizer: Decodes responses.
        stop_ids: Tokens that end a response.
        ranks: This process among those of the run.
        transfer: How weights reach the servers.
        stop_texts: Texts that end a response, as those of `TransformersEngine`.
        max_sequences: Rollouts that this rank asks for at once.
        on_death: Whether a server that dies ends the run or is left out.
        sync_timeout_s: Limit of one weight update, seconds.
    """

    takes_original_names = True

    def __init__(
        self,
        clients: Sequence[ServerClient],
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        ranks: Ranks,
        transfer: Transfer,
        *,
        stop_texts: Sequence[str] = (),
        max_sequences: int,
        on_death: str = "stop",
        sync_timeout_s: float = 300.0,
        thought_tags: Sequence[str] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._thought_tags = thought_tags
        self.max_sequences = max_sequences
        self._clients = list(clients)
        self._stop_ids = sorted(stop_ids)
        self._stop_texts = tuple(stop_texts)
        self._ranks = ranks
        self._transfer = transfer
        self._on_death = on_death
        self._sync_timeout_s = sync_timeout_s
        self._dead: dict[str, str] = {}  # URL -> what was seen of its death
        self._lock = threading.Lock()
        self._run = uuid.uuid4().hex[:12]
        self._num_syncs = 0
        self._version: str | None = None

    @classmethod
    def connect(
        cls,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        stop_texts: Sequence[str],
        ranks: Ranks,
    ) -> VllmServerEngine:
        """The engine that a configuration describes; all its servers must be running.

        Raises:
            SamplerLost: One of them does not answer.
        """
        clients, facts, failure = connect(config), {}, None
        try:
            facts = {client.url: client.describe() for client in clients}
        except (ServerDied, ServerError) as error:
            failure = SamplerLost(f"vLLM server {error}")
        distributed.raise_everywhere(failure)
        over_nccl = any(fact.transfer == "nccl" for fact in facts.values())
        return cls(
            clients,
            tokenizer,
            stop_ids,
            ranks,
            NcclTransfer({url: fact.world_size for url, fact in facts.items()}) if over_nccl else FileTransfer(),
            stop_texts=stop_texts,
            max_sequences=config.rollout.max_sequences,
            on_death=config.rollout.server.on_death,
            sync_timeout_s=config.rollout.server.sync_timeout_s,
            thought_tags=config.data.thought_tags,
        )

    @property
    def living(self) -> list[ServerClient]:
        """The servers that nothing bad is known of."""
        return [client for client in self._clients if client.url not in self._dead]

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
        """Sample `group_size` responses to each prompt, as `RolloutEngine.generate` says; no other rank takes part.

        Rollout k of a prompt is seeded by (`seed`, `uid`, k) whichever server it comes from. A server's batches depend
        on when requests arrive, so equal calls give equal rollouts up to the rounding of the logits.

        Raises:
            ValueError: An argument is out of its range, or a prompt has no tokens.
            SamplerLost: A server died or refused a prompt; with `on_death` continue: none is left. Or a server's
                weights are not those that it was sent.
            FloatingPointError: The log-probabilities are not finite.
        """
        check_arguments(prompts, group_size, max_new_tokens, temperature, top_p, top_k)
        if not prompts:
            return []
        request = SamplingRequest(
            group_size, max_new_tokens, temperature, top_p, top_k, self._stop_ids, self._stop_texts
        )
        # vLLM seeds the rollouts of a request with the numbers that follow the first one's.
        calls = [
            partial(self._sample, place, prompt, request, rollout_seed(seed, prompt.uid, 0))
            for place, prompt in enumerate(prompts)
        ]
        waiting = run_beside(calls, max(1, self.max_sequences // group_size))
        try:
            wait(waiting, return_when=FIRST_EXCEPTION)
            failed = next((f.exception() for f in waiting if f.done() and f.exception() is not None), None)
            if failed is not None:
                raise failed
            sampled = [future.result() for future in waiting]
        finally:
            for future in waiting:
                future.cancel()
        self._check_versions()
        return [Group(prompt, self._with_texts(rollouts)) for prompt, rollouts in zip(prompts, sampled, strict=True)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send a whole set of weights to all living servers; called by all ranks, while nothing is being sampled.

        The iterator is run to its end on every rank, whatever happens, since ranks gather weights together in it.

        Raises:
            SamplerLost: A server failed or was late, in its own words; with `on_death` continue: none is left.
        """
        self._agree_on_the_dead()
        self._num_syncs += 1
        version = f"{self._run}/{self._num_syncs}"
        failure: SamplerLost | None = None
        if self._ranks.is_main:
            try:
                self._send(weights, version)
            except SamplerLost as error:
                failure = error
        for _ in weights:
            continue
        distributed.raise_everywhere(failure)
        # The name begins with rank 0's own part, and it may have found servers dead.
        self._version = distributed.broadcast_object(version)
        self._agree_on_the_dead()

    def score(self, prompt: Prompt, rollout: Rollout) -> dict[str, list[float]]:
        """Log-probabilities of all of a rollout's tokens but the last, by URL of the living servers.

        Raises:
            SamplerLost: As `generate`.
        """
        token_ids = [*prompt.token_ids, *rollout.token_ids[:-1]]
        scores = {}
        for client in self.living:
            try:
                scores[client.url] = client.score(token_ids, len(prompt.token_ids))
            except (ServerDied, ServerError) as error:
                self._leave_out(client, error)
        return scores

    def sleep(self) -> None:
        """Nothing to do: the servers have devices of their own."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do: a connection is one request's own and ends with it, or with the process."""

    def _send(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        if not self.living:
            raise SamplerLost(self._obituary())
        try:
            send_weights(
                self._transfer, self.living, weights, version=version, limit_s=self._sync_timeout_s,
                lose=lambda client, error: self._leave_out(client, error, " (weight sync)"),
            )  # fmt: skip
        except (OSError, RuntimeError, ImportError) as error:
            if isinstance(error, SamplerLost):
                raise
            raise SamplerLost(f"weight sync failed: {error}") from error

    def _sample(self, place: int, prompt: Prompt, request: SamplingRequest, seed: int) -> list[Rollout]:
        lost_connections = 0
        while True:
            client = self._pick(place)
            try:
                return client.complete(prompt.token_ids, request, seed)
            except ServerDied as error:
                # A connection that broke while the server lives gets another chance, a late answer does not.
                lost_connections += 1
                if isinstance(error, ServerLate) or lost_connections > MAX_LOST_CONNECTIONS or not client.is_alive():
                    self._leave_out(client, error)
            except ServerError as error:
                if client.is_alive():  # it would say the same again, and so would the others
                    raise SamplerLost(f"vLLM server {error}") from None
                self._leave_out(client, error)

    def _pick(self, place: int) -> ServerClient:
        living = self.living
        if not living or (self._dead and self._on_death == "stop"):
            raise SamplerLost(self._obituary())
        return living[(place + self._ranks.rank) % len(living)]

    def _leave_out(self, client: ServerClient, error: Exception, when: str = "") -> None:
        """Take a server for dead; ends the run where that is what `on_death` says, or where none is left."""
        with self._lock:
            new = client.url not in self._dead
            self._dead.setdefault(client.url, f"{error}{when}")
        if self._on_death == "stop" or not self.living:
            raise SamplerLost(self._obituary())
        if new:
            logger.warning("vLLM server %s; it is left out, %d go on", self._dead[client.url], len(self.living))

    def _obituary(self) -> str:
        told = "; ".join(f"vLLM server {reason}" for reason in list(self._dead.values()))
        return told if self._on_death == "stop" else f"{told}; none is left"

    def _agree_on_the_dead(self) -> None:
        """A server that any rank lost is lost to all, before rank 0 sends weights and after."""
        for dead in distributed.all_objects(self._dead):
            self._dead = {**dead, **self._dead}

    def _check_versions(self) -> None:
        """Nobody else may have put weights into the servers, and none may have been started again meanwhile."""
        for client in self.living if self._version is not None else ():
            try:
                found = client.weight_version()
            except (ServerDied, ServerError) as error:
                self._leave_out(client, error)
                continue
            if found != self._version:
                raise SamplerLost(
                    f"vLLM server {client.url} holds the weights {found!r} instead of {self._version!r}, which it was "
                    "sent: was it started again, or does another run use it?"
                )

    def _with_texts(self, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        text_of = response_decoder(self.tokenizer, self._thought_tags)
        finished = []
        for rollout in rollouts:
            text, stopped = until_stop(text_of(spoken_ids(rollout.token_ids, self._stop_ids)), self._stop_texts)
            finished.append(replace(rollout, text=text, truncated=rollout.truncated and not stopped))
        return tuple(finished)
