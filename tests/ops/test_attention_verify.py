"""Attention: what it computes, and what its cache holds. The rest is in ``test_window_contract.py``."""

import pytest
import torch
import torch.nn.functional as F
from cases import ATTENTION
from description import Row

from speculative_mamba.ops import attention_verify
from speculative_mamba.ops.checks import WEIGHT_DTYPES
from speculative_mamba.testing.tolerance import assert_bitwise_equal

dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)


@pytest.mark.ops(ATTENTION)
def test_it_is_scaled_dot_product_attention(row: Row, backend: str) -> None:
    """The rotation of q as a product of complex numbers; keys as the cache holds them."""
    inputs = row.make()
    y = ATTENTION.run(inputs, backend, scale=0.3)
    pairs = 0 if inputs["inv_freq"] is None else len(inputs["inv_freq"])
    tokens, heads = inputs["q"].shape[1:3]
    for b in range(len(y)):
        length = int(inputs["lengths"][b, tokens - 1])
        q = inputs["q"][b].double()
        angles = torch.arange(length - tokens, length).double()[:, None, None]
        if pairs:
            turn = torch.polar(torch.ones(()).double(), angles * inputs["inv_freq"].double())
            turned = torch.complex(q[..., :pairs], q[..., pairs : 2 * pairs]) * turn
            q = torch.cat([turned.real, turned.imag, q[..., 2 * pairs :]], -1)
        entries = [
            inputs[name][b, :, :length].double().repeat_interleave(heads // inputs["k"].shape[2], 0)
            for name in ("keys", "values")
        ]
        mask = torch.ones(tokens, length).tril(length - tokens).bool()
        expected = F.scaled_dot_product_attention(q.transpose(0, 1), *entries, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(y[b].double(), expected.transpose(0, 1), rtol=1e-4, atol=1e-5)


def roomy(capacity: int, dtype: torch.dtype) -> dict:
    small, caches = ATTENTION.make({"capacity": 45, "dtype": dtype}), {}
    for name in ("keys", "values"):
        caches[name] = torch.full((3, 2, capacity, 20), torch.nan, dtype=dtype)
        caches[name][:, :, :45] = small[name]
    return caches


@pytest.mark.parametrize("capacity", [45, 46, 64, 1000])
@dtypes
def test_the_capacity_does_not_change_a_bit(dtype: torch.dtype, capacity: int, backend: str) -> None:
    """45 entries are just enough."""
    y = [
        ATTENTION.run(ATTENTION.make({"capacity": 45, "dtype": dtype}) | roomy(capacity, dtype), backend)
        for capacity in (70, capacity)
    ]
    assert_bitwise_equal(y[1], y[0], "y")


CHUNKS_OF_CUDA = 64 * 256  # entries from which a split of the CUDA kernel takes more than one chunk


def test_a_long_text(kernels: str) -> None:
    """Across the entry where splits start to take a second chunk: as PyTorch, as token by token, in any capacity.

    Catches: a chunk that replaces its split's sums; its sums added without their scale."""
    if kernels == "triton" and not torch.cuda.is_available():
        pytest.skip("its blocks have one size, and 512 of them take the interpreter a minute")
    length, tokens, g = CHUNKS_OF_CUDA - 2, 5, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, 4, generator=g) for heads in (2, 1, 1))
    keys, values = torch.randn(2, 1, 1, length + 600, 4, generator=g)
    keys[:, :, : length // 2] *= 2  # so that the largest score lies early, later ones are scaled

    def run(capacity: int, step: int) -> torch.Tensor:
        caches = [
            F.pad(cache[:, :, :length], (0, 0, 0, capacity - length), value=torch.nan) for cache in (keys, values)
        ]
        lengths, start, parts = torch.full((1, 5), length, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), []
        for t in range(0, tokens, step):
            part = [tensor[:, t : t + step] for tensor in (q, k, v)]
            parts.append(attention_verify(*part, *caches, lengths, start, backend=kernels))
            lengths[:, 0] = lengths[:, step - 1].clone()
        return torch.cat(parts, 1)

    y = run(length + 5, tokens)
    for capacity, step in ((length + 5, 1), (3 * length, tokens)):
        assert_bitwise_equal(run(capacity, step), y, f"y in a cache of {capacity} entries, {step} tokens at a time")
    mask = torch.ones(tokens, length + tokens).tril(length).bool()
    entries = (torch.cat([cache[0, :, :length], new[0].transpose(0, 1)], 1) for cache, new in ((keys, k), (values, v)))
    entries = [each.double().expand(2, -1, -1) for each in entries]
    expected = F.scaled_dot_product_attention(q[0].transpose(0, 1).double(), *entries, attn_mask=mask)
    torch.testing.assert_close(y[0].double(), expected.transpose(0, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_large_scores(score: float, backend: str) -> None:
    """Every key scores alike, so y is the mean of the values, whatever the score is; of 40 entries and one."""
    inputs = ATTENTION.make({"batch": 1, "lengths": (40,), "tokens": 1, "pairs": None})
    for name, value in (("q", score), ("k", 1.0), ("keys", 1.0)):
        inputs[name].fill_(value)
    y = ATTENTION.run(inputs, backend, scale=1.0)
    expected = inputs["values"][0, :, :41].mean(1).repeat_interleave(2, 0)
    torch.testing.assert_close(y[0, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [0, 31, 32, 40])
def test_one_key_may_outweigh_all_others(at: int, backend: str) -> None:
    """The greatest score may come in any block; its value is y, the others are worth exp(-200) or less."""
    inputs = ATTENTION.make({"batch": 1, "lengths": (40,), "tokens": 1, "pairs": None})
    inputs["q"].fill_(1)
    inputs["k"].fill_(-5)
    inputs["keys"][:, :, :40] = -5
    (inputs["k"][0, 0] if at == 40 else inputs["keys"][0, :, at]).fill_(5)
    y = ATTENTION.run(inputs, backend, scale=1.0)
    assert_bitwise_equal(y[0, 0], inputs["values"][0, :, at].repeat_interleave(2, 0), "y")


def refused(match: str, backend: str, **wrong: object) -> None:
    inputs = {**ATTENTION.make(), **wrong}
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    with pytest.raises(ValueError, match=match) as caught:
        ATTENTION.run(inputs, backend)
    assert "\n" not in str(caught.value)
    for name, tensor in before.items():
        assert_bitwise_equal(inputs[name], tensor, name)


def test_what_does_not_fit_into_the_cache_is_refused(backend: str) -> None:
    full = ATTENTION.make({"capacity": 44})
    caches = {name: full[name] for name in ("keys", "values")}
    refused("5 tokens after 40 do not fit into a cache of 44 entries", backend, **caches)
    refused("do not fit", backend, **caches, final_state_only=True)
    ATTENTION.run({**full, "left_padding": torch.tensor([0, 0, 1], dtype=torch.int32)}, backend)
    refused("5 tokens after -1 do not fit", backend, lengths=torch.full((3, 8), -1, dtype=torch.int32))


TENSORS = (*ATTENTION.per_token, *ATTENTION.written, "start_slot", "inv_freq")


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    tensor = ATTENTION.make()[name]
    refused(rf"\b{name}\b", backend, **{name: tensor.double()})
    refused(rf"\b{name}\b", backend, **{name: tensor[None]})
    # Where q is the odd one out, the message names the first tensor that is not with it.
    refused(r"\bmeta\b" if name == "q" else rf"\b{name}\b.*\bmeta\b", backend, **{name: tensor.to("meta")})
    refused(rf"\b{name}\b.*contiguous", backend, **{name: tensor.repeat_interleave(2, -1)[..., ::2]})
    if name not in ("q", "inv_freq"):
        refused(rf"\b{name}\b", backend, **{name: torch.cat([tensor, tensor[:1]])})
    if name in (*ATTENTION.per_token, "keys", "values"):
        refused(rf"\b{name}\b.*contiguous", backend, **{name: torch.cat([tensor, tensor], -1)[..., :20]})


def test_other_arguments_that_do_not_fit_are_refused(backend: str) -> None:
    refused("heads of k must divide those of q, got 2 and 3", backend, q=torch.randn(3, 5, 3, 20))
    refused(r"inv_freq must be \(R\) with 2R <= 20", backend, inv_freq=torch.ones(11))
    refused("values must be torch.float32", backend, values=ATTENTION.make()["values"].half())
    refused("5 tokens from slot 4 on do not fit into 8 slots", backend, write_slot=4)
    refused("write_slot must be 0", backend, write_slot=1, final_state_only=True)
    refused("start_slot", backend, start_slot=torch.tensor([0, 8, 0], dtype=torch.int32))
    refused("left_padding", backend, left_padding=torch.zeros(4, dtype=torch.int32))
    refused("at least one token", backend, **{name: ATTENTION.make()[name][:, :0] for name in ATTENTION.per_token})
    refused("unknown backend", "gpu")
