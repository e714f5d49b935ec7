"""No rows give an empty result; no tokens are refused. Either leaves what is written alone."""

import pytest
import torch
from cases import CASES, Random

from speculative_mamba import ops
from speculative_mamba.testing.sampling import tensors

OP = "speculative_accept"  # has every kind of kernel


def test_no_rows(op: str, backend: str) -> None:
    window, cache, rest = CASES[op](Random(torch.float32))
    if cache:
        rest["start_slot"] = torch.zeros(0, dtype=torch.int32)
    none = {name: tensor[:0] for name, tensor in (window | cache).items()}
    y = getattr(ops, op)(**none, **rest, backend=backend)
    for result in y if isinstance(y, tuple) else [y]:
        assert len(result) == 0 and result.dtype is torch.float32


def test_no_tokens(op: str, backend: str) -> None:
    window, cache, rest = CASES[op](Random(torch.float32))
    if not cache:
        return  # rows of a matrix have no tokens
    before = {name: tensor.clone() for name, tensor in cache.items()}
    rest["start_slot"] = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^x must hold at least one token per row$"):
        getattr(ops, op)(**{name: part[:, :0] for name, part in window.items()}, **cache, **rest, backend=backend)
    for name, tensor in cache.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


def test_no_rows_to_choose_for(backend: str) -> None:
    logits, keys, positions = torch.zeros(0, 3, 9), torch.zeros(0, 2).long(), torch.zeros(0).long()
    sampling = tensors([], 0, 9)
    tokens = ops.sample_tokens(logits[:, 0], sampling, keys, positions, backend=backend)
    accepted, next_token = ops.speculative_accept(
        logits, torch.zeros(0, 2).long(), None, sampling, keys, positions, backend=backend
    )
    assert len(tokens) == len(accepted) == len(next_token) == 0
