"""The tape that stands for a CUDA graph in the tests without a GPU."""

import pytest
import torch

from speculative_mamba.ops import backend as backends
from speculative_mamba.testing.models import random_model, tiny_config
from speculative_mamba.testing.recording import Tape
from speculative_mamba.testing.tolerance import assert_bitwise_equal


def test_the_tape_finds_values_that_the_host_reads() -> None:
    value = torch.ones(3)
    with pytest.raises(AssertionError, match="the host reads"), Tape().running():
        value.sum().item()


def test_the_tape_replays_ops_and_calls_of_pytorch() -> None:
    """On what lies in the tensors by then."""
    model = random_model(tiny_config(), backend="cpu")
    tape, tokens, cache = Tape(), torch.tensor([[3]]), list(model.new_cache(1, 1))
    start = torch.zeros(1, dtype=torch.int32)
    with torch.no_grad(), tape.running():
        logits = model.verify(tokens, cache, start)
    fresh = list(model.new_cache(1, 1))
    expected = [model.verify(torch.tensor([[token]]), fresh, start).clone() for token in (3, 7, 9)]
    assert_bitwise_equal(logits, expected[0], "recorded")
    for token, right in zip((7, 9), expected[1:], strict=True):
        tokens[:] = token
        tape.replay()
        assert_bitwise_equal(logits, right, "replayed")
    assert backends._implementation.__module__ == backends.__name__
