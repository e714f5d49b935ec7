"""What the tests of the engine share: pairs of models, and what ``generate`` gives for a request alone."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import random_model, tiny_architecture, tiny_config


@functools.cache
def _pair(kind: str) -> tuple[sm.MambaLM, sm.MambaLM]:
    config = tiny_config(tie_embeddings=False) if kind == "mamba1" else tiny_architecture(kind)
    target = random_model(config, backend="cpu")
    noise = torch.randn(target.head.shape, generator=torch.Generator().manual_seed(5))
    return target, dataclasses.replace(target, head=oracle.dense(target.head, torch.float32) + 0.08 * noise)


@pytest.fixture(scope="session")
def pair() -> Callable[[str], tuple[sm.MambaLM, sm.MambaLM]]:
    """pair(kind): a tiny target of one of ``ARCHITECTURES``, without a tokenizer, and a draft that agrees at times."""
    return _pair


@pytest.fixture(scope="session")
def embedded() -> tuple[sm.MambaLM, sm.MambaLM]:
    """The embedded pair, which has a tokenizer."""
    return sm.load_model("builtin:target"), sm.load_model("builtin:draft")


@pytest.fixture(scope="session")
def alone() -> Callable[..., sm.GenerationResult]:
    """alone(target, request): what ``generate`` gives for it, decoded plainly, coupled, with logits."""

    def generate(target: sm.MambaLM, request: sm.Request) -> sm.GenerationResult:
        sampling = dataclasses.replace(request.sampling, seed=[request.sampling.seed])
        return sm.generate(
            target, [request.prompt], max_new_tokens=request.max_new_tokens, sampling=sampling,
            stop_token_ids=request.stop_token_ids, stop_strings=request.stop_strings, acceptance="coupled",
            output_logits=True,
        )  # fmt: skip

    return generate
