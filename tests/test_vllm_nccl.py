"""Weights over NCCL from the trainer's GPU to a server's; wants two GPUs (`DS_ACCELERATOR=cuda pytest -m gpu`)."""

from __future__ import annotations

import time

import pytest
import torch
from launching import SMALL
from serving import Server

from clipo_ds.config import load_config
from clipo_ds.distributed import Ranks
from clipo_ds.models import load_causal_lm, materialise_model, stop_token_ids
from clipo_ds.types import Prompt, SamplerLost
from clipo_ds.vllm_client import ServerClient
from clipo_ds.vllm_server import VllmServerEngine
from clipo_ds.vllm_transfer import NcclTransfer
from clipo_ds.warm_start import build_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants a GPU for the trainer and one for the server"),
]


def test_logprobs_are_those_of_the_weights_that_were_broadcast(ranks: Ranks, tmp_path):
    folder = materialise_model("arithmetic", task=load_config("demo", SMALL[1:]).task)
    server = Server(tmp_path / "log", *SMALL, "--weights=nccl", DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES="1")
    try:
        server.wait()
        client, tokenizer = ServerClient(server.url, 60.0), build_tokenizer()
        assert client.describe().transfer == "nccl"
        engine = VllmServerEngine(
            [client], tokenizer, stop_token_ids(tokenizer, None), ranks, NcclTransfer({server.url: 1}), max_sequences=64
        )
        model = load_causal_lm(folder, dtype="float32", device="cuda:0")
        for shift in (0.0, 0.01):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(shift)
            engine.load_weights((n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False))
            (group,) = engine.generate(
                [Prompt(0, "", (4, 12, 3, 12, 5, 13), "0", "test")], 8, max_new_tokens=16, seed=1
            )
            for rollout in group.rollouts:
                ids = torch.tensor([[*group.prompt.token_ids, *rollout.token_ids]], device="cuda:0")
                logprobs = model(ids).logits[0, 5:-1].float().log_softmax(-1)
                expected = logprobs.gather(1, ids[0, 6:, None]).squeeze(1).cpu()
                torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-2, rtol=0)
            if shift:
                server.pause()  # it is there and takes nothing: what a death in the middle of a broadcast looks like
                began = time.monotonic()
                with pytest.raises(SamplerLost, match=r"did not receive the weights|did not answer"):
                    engine._sync_timeout_s = 5.0
                    engine.load_weights((n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False))
                # Nothing on the GPU waits for it: neither the current stream, nor, the group aborted, any other.
                assert all(p.isfinite().all().item() for p in model.parameters())
                torch.cuda.synchronize()
                assert time.monotonic() - began < 20
    finally:
        server.kill()
