"""What the tests of the engine share: pairs of models, and what ``generate`` gives for a request alone."""

import dataclasses
import functools

import torch

import speculative_mamba as sm
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import TableModel, random_model, tiny_architecture, tiny_config

WAIT = 60  # seconds, after which something hangs


@functools.cache
def pair(kind: str) -> tuple[sm.MambaLM, sm.MambaLM]:
    """The embedded pair, which has a tokenizer; or a tiny target of one of ``ARCHITECTURES``, and a draft that agrees
    with it now and then."""
    if kind == "embedded":
        return sm.load_model("builtin:target"), sm.load_model("builtin:draft")
    config = tiny_config(tie_embeddings=False) if kind == "mamba1" else tiny_architecture(kind)
    target = random_model(config, backend="cpu")
    noise = torch.randn(target.head.shape, generator=torch.Generator().manual_seed(5))
    return target, dataclasses.replace(target, head=oracle.dense(target.head, torch.float32) + 0.08 * noise)


def ring(count: int = 40) -> TableModel:
    """Token i is followed by i+1."""
    return TableModel(torch.eye(count).roll(1, dims=1))


def alone(target: sm.MambaLM, request: sm.Request) -> sm.GenerationResult:
    """What ``generate`` gives for it, decoded plainly, coupled, with logits."""
    sampling = dataclasses.replace(request.sampling, seed=[request.sampling.seed])
    return sm.generate(
        target, [request.prompt], max_new_tokens=request.max_new_tokens, sampling=sampling,
        stop_token_ids=request.stop_token_ids, stop_strings=request.stop_strings, acceptance="coupled",
        output_logits=True,
    )  # fmt: skip
