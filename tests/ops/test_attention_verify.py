"""Attention over a cache that goes back by its length. Memory that must not be read holds NaN; what must not be written
is compared.
"""

import pytest
import torch
import torch.nn.functional as F

from speculative_mamba.ops import attention_verify
from speculative_mamba.ops.attention_verify import AttentionVerifyArgs, reference
from speculative_mamba.ops.checks import WEIGHT_DTYPES
from speculative_mamba.ops.recording import Recording
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

ORDER = ("q", "k", "v", "keys", "values", "lengths", "start_slot", "write_slot", "inv_freq", "scale")
PER_TOKEN = ("q", "k", "v")
CACHE = ("keys", "values", "lengths")
LENGTHS = (29, 0, 40)  # of the rows: the window of one crosses the end of a block of 32 entries, one row is empty
BASE = {
    "lengths": LENGTHS, "tokens": 5, "heads": 4, "kv_heads": 2, "dims": 20, "pairs": 10, "slots": 8, "capacity": 70,
    "contiguous": False, "dtype": torch.float32,
}  # fmt: skip
CHANGES = [
    {},
    {"lengths": (63,)},
    {"lengths": (30, 62, 59)},  # a token ends a block, or comes just before
    {"lengths": (31, 32, 33), "tokens": 1},
    {"lengths": (500, 257), "capacity": 600, "dims": 64, "pairs": 32},
    {"lengths": (253, 511), "capacity": 516},
    {"tokens": 2},
    {"tokens": 16, "slots": 17},
    {"tokens": 64, "slots": 64, "capacity": 104},
    {"heads": 2},
    {"heads": 5, "kv_heads": 1},
    {"heads": 1, "kv_heads": 1},
    {"heads": 9, "kv_heads": 3},
    {"dims": 1, "pairs": 0},
    {"dims": 10, "pairs": 5},
    {"dims": 16, "pairs": 3},
    {"dims": 77, "pairs": 37},
    {"dims": 128, "pairs": 64},
    {"pairs": None},
    {"slots": 5},
    {"contiguous": True},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16, "tokens": 16, "slots": 17, "dims": 16, "pairs": 8},
    {"dtype": torch.float16, "heads": 6, "dims": 33, "pairs": 4, "contiguous": True},
]
rows = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")
dtypes = pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)


def make(change: dict | None = None, seed: int = 0, start: int = 0) -> dict:
    """Arguments of the op, ``dtype`` that of the cache; slot ``start`` is each row's text.

    q, k and v are slices of one packed tensor with NaN around them. Entries beyond a row's length are NaN, lengths of
    other slots make no sense.
    """
    c = {**BASE, **(change or {})}
    batch, tokens, heads, kv_heads, dims = len(c["lengths"]), c["tokens"], c["heads"], c["kv_heads"], c["dims"]
    g = torch.Generator().manual_seed(seed)
    sizes = [heads * dims, kv_heads * dims, kv_heads * dims]
    packed = torch.full((batch, tokens, 3 + sum(sizes) + 4), torch.nan)
    packed[..., 3:-4] = torch.randn(batch, tokens, sum(sizes), generator=g)
    q, k, v = (part.unflatten(-1, (-1, dims)) for part in packed[..., 3:-4].split(sizes, -1))
    if c["contiguous"]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()

    def cache() -> torch.Tensor:
        shape = (kv_heads, batch, 1 if c["contiguous"] else 2, c["capacity"], dims)
        entries = torch.full(shape, torch.nan, dtype=c["dtype"])[:, :, 0].transpose(0, 1)
        for b, length in enumerate(c["lengths"]):
            entries[b, :, :length] = torch.randn(kv_heads, length, dims, generator=g)
        return entries

    lengths = torch.full((batch, c["slots"]), 10**9, dtype=torch.int32)
    lengths[:, start] = torch.tensor(c["lengths"], dtype=torch.int32)
    pairs = c["pairs"]
    return {
        "q": q,
        "k": k,
        "v": v,
        "keys": cache(),
        "values": cache(),
        "lengths": lengths,
        "start_slot": torch.full((batch,), start, dtype=torch.int32),
        "inv_freq": None if pairs is None else 10000.0 ** -(torch.arange(pairs) / max(pairs, 1)),
    }


def cut(inputs: dict, tokens: slice = slice(None), batch: slice = slice(None), **other: object) -> dict:
    """Views of some tokens and rows."""
    part = {k: v[batch, tokens] if k in PER_TOKEN else v for k, v in inputs.items()}
    return {**part, **{k: inputs[k][batch] for k in (*CACHE, "start_slot")}, **other}


def copy(inputs: dict, **other: object) -> dict:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} | other


def run(inputs: dict, backend: str, **other: object) -> torch.Tensor:
    return attention_verify(**{**inputs, **other}, backend=backend)


def poisoned(inputs: dict) -> dict:
    """Copies of the caches with NaN beyond each row's text, and its length as the only slot."""
    texts = inputs["lengths"].gather(1, inputs["start_slot"].long()[:, None])
    caches = {name: inputs[name].clone() for name in ("keys", "values")}
    for b, text in enumerate(texts.flatten().tolist()):
        for cache in caches.values():
            cache[b, :, text:] = torch.nan
    return {**caches, "lengths": texts, "start_slot": torch.zeros_like(inputs["start_slot"])}


def steps(inputs: dict, backend: str) -> tuple[torch.Tensor, dict]:
    """y of T calls of one token that each start from and write the one slot, and the cache after them: plain decoding
    on a cache that never held anything else.
    """
    mine = {**inputs, **poisoned(inputs)}
    y = [run(cut(mine, slice(t, t + 1)), backend) for t in range(inputs["q"].shape[1])]
    return torch.cat(y, 1), mine


def double(inputs: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


@rows
def test_error_is_within_twice_that_of_pytorch(change: dict, kernels: str) -> None:
    inputs = make(change)
    actual, single, exact = copy(inputs), copy(inputs), double(inputs)
    y, y_single = run(actual, kernels), run(single, "reference")
    exact |= {"write_slot": 0, "scale": inputs["q"].shape[-1] ** -0.5}
    y_exact = reference.attention_verify(AttentionVerifyArgs(*[exact[k] for k in ORDER], None, False))
    assert_accurate(y, y_single, y_exact, what="y")
    for name in ("keys", "values"):
        # As float32, whose unit in the last place is the smaller one.
        entries = [torch.nan_to_num(each[name]) for each in (actual, single, exact)]
        assert_accurate(entries[0].float(), entries[1].float(), entries[2], what=name)
    assert_bitwise_equal(actual["lengths"], single["lengths"], "lengths")


@rows
def test_it_is_scaled_dot_product_attention(change: dict, backend: str) -> None:
    """The rotation of q as a product of complex numbers; keys as the cache holds them."""
    inputs = make(change)
    y = run(inputs, backend, scale=0.3)
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


@rows
def test_one_call_equals_one_token_at_a_time(change: dict, backend: str) -> None:
    inputs = make(change)
    y_steps, plain = steps(inputs, backend)
    y = run(inputs, backend)
    assert y.isfinite().all() and y.is_contiguous()
    assert_bitwise_equal(y, y_steps, "y")
    for name in ("keys", "values"):
        assert_bitwise_equal(inputs[name], plain[name], name)
    tokens = y.shape[1]
    expected = plain["lengths"] - torch.arange(tokens - 1, -1, -1, dtype=torch.int32)
    assert_bitwise_equal(inputs["lengths"][:, :tokens], expected, "lengths")


@rows
def test_rows_do_not_see_each_other(change: dict, backend: str) -> None:
    inputs = make(change)
    alone = copy(inputs)
    y = run(inputs, backend)
    for b in range(len(y)):
        one = slice(b, b + 1)
        assert_bitwise_equal(run(cut(alone, batch=one), backend), y[one], f"y of row {b}")
        for name in CACHE:
            assert_bitwise_equal(alone[name][one], inputs[name][one], f"{name} of row {b}")


@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
def test_threads_do_not_change_a_bit(final_state_only: bool, backend: str) -> None:
    inputs = make({"lengths": (900, 7, 500), "heads": 18, "kv_heads": 9, "dims": 64, "capacity": 910})
    results = []
    for threads in (1, 2, 4, 4, 4, 3):
        torch.set_num_threads(threads)
        mine = copy(inputs)
        results.append((run(mine, backend, final_state_only=final_state_only), *(mine[name] for name in CACHE)))
    for result in results[1:]:
        for name, actual, expected in zip(("y", *CACHE), result, results[0], strict=True):
            assert_bitwise_equal(actual, expected, name)


@pytest.mark.parametrize("capacity", [45, 46, 64, 1000])
@dtypes
def test_the_capacity_does_not_change_a_bit(dtype: torch.dtype, capacity: int, backend: str) -> None:
    """45 entries are just enough."""
    y = [run(make({"capacity": 45, "dtype": dtype}) | roomy(capacity, dtype), backend) for capacity in (70, capacity)]
    assert_bitwise_equal(y[1], y[0], "y")


def roomy(capacity: int, dtype: torch.dtype) -> dict:
    small, caches = make({"capacity": 45, "dtype": dtype}), {}
    for name in ("keys", "values"):
        caches[name] = torch.full((3, 2, capacity, 20), torch.nan, dtype=dtype)
        caches[name][:, :, :45] = small[name]
    return caches


@pytest.mark.parametrize("write_slot", [0, 2, 3])
@pytest.mark.parametrize("start", [0, 4, 7])
def test_only_the_window_is_written(start: int, write_slot: int, backend: str) -> None:
    inputs = make(start=start)
    before, packed = copy(inputs), inputs["q"]._base.clone()
    run(inputs, backend, write_slot=write_slot)
    expected = before["lengths"].clone()
    expected[:, write_slot : write_slot + 5] = torch.tensor(LENGTHS)[:, None] + torch.arange(1, 6)
    assert_bitwise_equal(inputs["lengths"], expected, "lengths")
    for name in ("keys", "values"):
        for b, length in enumerate(LENGTHS):
            window = slice(length, length + 5)
            assert inputs[name][b, :, window].isfinite().all()
            before[name][b, :, window] = inputs[name][b, :, window]
        assert_bitwise_equal(inputs[name], before[name], f"{name} outside the window")
        assert inputs[name]._base[:, :, 1].isnan().all(), "memory between the entries"
    assert_bitwise_equal(inputs["q"]._base, packed, "q, k, v")
    for name in ("start_slot", "inv_freq"):
        assert_bitwise_equal(inputs[name], before[name], name)


@pytest.mark.parametrize("accepted", range(5))
@dtypes
def test_a_rejected_window_leaves_no_trace(dtype: torch.dtype, accepted: int, backend: str) -> None:
    inputs, more = make({"dtype": dtype}, start=7), make(seed=1)
    fresh = steps(cut(inputs, slice(0, accepted + 1)), backend)[1]
    run(inputs, backend)
    inputs["start_slot"].fill_(accepted)
    window = {**more, **{name: inputs[name] for name in (*CACHE, "start_slot")}}
    y_plain, plain = steps({**more, **{name: fresh[name] for name in (*CACHE, "start_slot")}}, backend)
    assert_bitwise_equal(run(window, backend), y_plain, "y")
    assert_bitwise_equal(inputs["lengths"][:, 4:5], plain["lengths"], "lengths")
    for name in ("keys", "values"):
        for b, length in enumerate(plain["lengths"].flatten().tolist()):
            assert_bitwise_equal(inputs[name][b, :, :length], plain[name][b, :, :length], f"{name} of row {b}")


@dtypes
def test_rounds_with_rejections_equal_plain_decoding(dtype: torch.dtype, backend: str) -> None:
    inputs = make({"slots": 5, "dtype": dtype})
    plain = poisoned(inputs)
    for seed, accepted in enumerate([[0, 3, 4], [2, 0, 4], [1, 0, 3], [4, 2, 0]]):
        window = cut({**make(seed=seed), **{name: inputs[name] for name in (*CACHE, "start_slot")}})
        y = run(window, backend)
        for b, count in enumerate(accepted):
            one = cut({**window, **plain}, slice(0, count + 1), slice(b, b + 1))
            for t in range(count + 1):
                assert_bitwise_equal(run(cut(one, slice(t, t + 1)), backend), y[b : b + 1, t : t + 1], f"row {b}")
        inputs["start_slot"].copy_(torch.tensor(accepted))


@pytest.mark.parametrize("accepted", range(4))
def test_a_draft_model_writes_one_slot_after_another(accepted: int, backend: str) -> None:
    """Two tokens to slots 0 and 1, then single tokens, each from the slot before its own."""
    inputs = make({"tokens": 5, "slots": 5}, start=accepted)
    y_steps, plain = steps(inputs, backend)
    y = [run(cut(inputs, slice(0, 2)), backend)]
    for slot in range(2, 5):
        inputs["start_slot"].fill_(slot - 1)
        y.append(run(cut(inputs, slice(slot, slot + 1)), backend, write_slot=slot))
    assert_bitwise_equal(torch.cat(y, 1), y_steps, "y")
    assert_bitwise_equal(inputs["lengths"], plain["lengths"] - torch.arange(4, -1, -1, dtype=torch.int32), "lengths")
    assert_bitwise_equal(inputs["keys"], plain["keys"], "keys")


@pytest.mark.parametrize("pieces", [[150], [64, 64, 22], [1, 70, 16, 63], [17] * 8 + [14]], ids=str)
@dtypes
def test_prefill_equals_verify_wherever_it_is_cut(dtype: torch.dtype, pieces: list[int], backend: str) -> None:
    inputs = make({"lengths": (0,), "tokens": 150, "slots": 3, "capacity": 150, "dtype": dtype})
    y_plain, plain = steps(inputs, backend)
    ends = torch.tensor(pieces).cumsum(0).tolist()
    parts = [cut(inputs, slice(end - length, end)) for end, length in zip(ends, pieces, strict=True)]
    assert_bitwise_equal(torch.cat([run(part, backend, final_state_only=True) for part in parts], 1), y_plain, "y")
    assert_bitwise_equal(inputs["keys"], plain["keys"], "keys")
    assert inputs["lengths"].tolist() == [[150, 10**9, 10**9]], "prefill writes slot 0 only"


@pytest.mark.parametrize("nulls", [[1, 0, 0], [0, 5, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
@dtypes
def test_null_columns_count_as_nothing(
    dtype: torch.dtype, nulls: list[int], final_state_only: bool, backend: str
) -> None:
    inputs = make({"dtype": dtype})
    for b, null in enumerate(nulls):
        for name in PER_TOKEN:
            inputs[name][b, :null] = torch.nan
    alone = copy(inputs)
    y = run(inputs, backend, final_state_only=final_state_only, left_padding=torch.tensor(nulls, dtype=torch.int32))
    for b, null in enumerate(nulls):
        row = slice(b, b + 1)
        y_alone, plain = steps(cut(alone, slice(null, None), row), backend) if null < 5 else (y[row, 5:], alone)
        assert_bitwise_equal(y[row, null:], y_alone, f"y of row {b}")
        assert not y[b, :null].any(), "y of left padding"
        for name in ("keys", "values"):
            expected = plain[name] if null < 5 else plain[name][row]
            assert_bitwise_equal(inputs[name][row], expected, f"{name} of row {b}")
        lengths = [LENGTHS[b] + max(0, t + 1 - null) for t in range(5)]
        assert inputs["lengths"][b].tolist() == (
            [lengths[4]] + [10**9] * 7 if final_state_only else lengths + [10**9] * 3
        )


def test_instruction_sets_with_fused_multiply_add_agree(fused_isas: list[str], select_isa: object) -> None:
    for change in CHANGES:
        results = []
        for isa in fused_isas:
            select_isa(isa)
            inputs = make(change)
            results.append((run(inputs, "cpu"), inputs["keys"], inputs["values"]))
        for result in results[1:]:
            for name, actual, expected in zip(("y", "keys", "values"), result, results[0], strict=True):
                assert_bitwise_equal(actual, expected, f"{name}, {change}")


@pytest.mark.parametrize("name", ["q", "k", "v", "keys", "values"])
def test_nan_reaches_exactly_what_depends_on_it(name: str, backend: str) -> None:
    inputs = make()
    expected = torch.zeros(3, 5, 4, 20, dtype=torch.bool)
    dims = slice(7, 8) if name in ("v", "values") else slice(None)
    if name in PER_TOKEN:
        inputs[name][2, 2, 1, 7] = torch.nan
        expected[2, 2 : 3 if name == "q" else 5, slice(1, 2) if name == "q" else slice(2, 4), dims] = True
    else:
        inputs[name][2, 1, 33, 7] = torch.nan
        expected[2, :, 2:, dims] = True
    assert_bitwise_equal(run(inputs, backend).isnan(), expected, "NaN")


@pytest.mark.parametrize("score", [-1e4, -200.0, 0.0, 200.0, 1e4])
def test_large_scores(score: float, backend: str) -> None:
    """Every key scores alike, so y is the mean of the values, whatever the score is; of 40 entries and one."""
    inputs = make({"lengths": (40,), "tokens": 1, "pairs": None})
    for name, value in (("q", score), ("k", 1.0), ("keys", 1.0)):
        inputs[name].fill_(value)
    y = run(inputs, backend, scale=1.0)
    expected = inputs["values"][0, :, :41].mean(1).repeat_interleave(2, 0)
    torch.testing.assert_close(y[0, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [0, 31, 32, 40])
def test_one_key_may_outweigh_all_others(at: int, backend: str) -> None:
    """The greatest score may come in any block; its value is y, the others are worth exp(-200) or less."""
    inputs = make({"lengths": (40,), "tokens": 1, "pairs": None})
    inputs["q"].fill_(1)
    inputs["k"].fill_(-5)
    inputs["keys"][:, :, :40] = -5
    (inputs["k"][0, 0] if at == 40 else inputs["keys"][0, :, at]).fill_(5)
    y = run(inputs, backend, scale=1.0)
    assert_bitwise_equal(y[0, 0], inputs["values"][0, :, at].repeat_interleave(2, 0), "y")


def test_a_recorded_call_follows_the_lengths(cpu: str) -> None:
    inputs = make()
    plain = copy(inputs)
    recording = Recording(torch.empty(0))
    with recording.record():
        y = run(inputs, cpu)
    run(plain, cpu)
    for accepted in (4, 0, 2):
        for each in (inputs, plain):
            each["start_slot"].fill_(accepted)
        recording.run()
        assert_bitwise_equal(y, run(plain, cpu), "y")
        assert_bitwise_equal(inputs["lengths"], plain["lengths"], "lengths")


def refused(match: str, backend: str, **wrong: object) -> None:
    inputs = {**make(), **wrong}
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    with pytest.raises(ValueError, match=match) as caught:
        run(inputs, backend)
    assert "\n" not in str(caught.value)
    for name, tensor in before.items():
        assert_bitwise_equal(inputs[name], tensor, name)


def test_what_does_not_fit_into_the_cache_is_refused(backend: str) -> None:
    full = make({"capacity": 44})
    caches = {name: full[name] for name in ("keys", "values")}
    refused("5 tokens after 40 do not fit into a cache of 44 entries", backend, **caches)
    refused("do not fit", backend, **caches, final_state_only=True)
    run({**full, "left_padding": torch.tensor([0, 0, 1], dtype=torch.int32)}, backend)
    refused("5 tokens after -1 do not fit", backend, lengths=torch.full((3, 8), -1, dtype=torch.int32))


TENSORS = [name for name in ORDER if name not in ("write_slot", "scale")]


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    tensor = make()[name]
    refused(rf"\b{name}\b", backend, **{name: tensor.double()})
    refused(rf"\b{name}\b", backend, **{name: tensor[None]})
    # Where q is the odd one out, the message names the first tensor that is not with it.
    refused(r"\bmeta\b" if name == "q" else rf"\b{name}\b.*\bmeta\b", backend, **{name: tensor.to("meta")})
    refused(rf"\b{name}\b.*contiguous", backend, **{name: tensor.repeat_interleave(2, -1)[..., ::2]})
    if name not in ("q", "inv_freq"):
        refused(rf"\b{name}\b", backend, **{name: torch.cat([tensor, tensor[:1]])})
    if name in (*PER_TOKEN, "keys", "values"):
        refused(rf"\b{name}\b.*contiguous", backend, **{name: torch.cat([tensor, tensor], -1)[..., :20]})


def test_other_arguments_that_do_not_fit_are_refused(backend: str) -> None:
    refused("heads of k must divide those of q, got 2 and 3", backend, q=torch.randn(3, 5, 3, 20))
    refused(r"inv_freq must be \(R\) with 2R <= 20", backend, inv_freq=torch.ones(11))
    refused("values must be torch.float32", backend, values=make()["values"].half())
    refused("5 tokens from slot 4 on do not fit into 8 slots", backend, write_slot=4)
    refused("write_slot must be 0", backend, write_slot=1, final_state_only=True)
    refused("start_slot", backend, start_slot=torch.tensor([0, 8, 0], dtype=torch.int32))
    refused("left_padding", backend, left_padding=torch.zeros(4, dtype=torch.int32))
    refused("at least one token", backend, **{name: make()[name][:, :0] for name in PER_TOKEN})
    refused("unknown backend", "gpu")
