"""The convolution and its window. Memory that must not be read holds NaN; what must not be written is compared."""

import pytest
import torch
import torch.nn.functional as F

from speculative_mamba.ops import causal_conv1d_verify
from speculative_mamba.ops.causal_conv1d_verify import CausalConv1dVerifyArgs, reference
from speculative_mamba.testing.tolerance import assert_accurate, assert_bitwise_equal

BASE = {"batch": 3, "tokens": 5, "channels": 33, "width": 4, "slots": 8, "dtype": torch.float32, "bias": True}
BASE |= {"weight": "contiguous", "contiguous": False, "silu": True, "repeat": 1, "block": None}
CHANGES = [
    {},
    {"batch": 1},
    {"tokens": 1},
    {"tokens": 2},
    {"tokens": 16, "slots": 17},
    {"channels": 1},
    {"channels": 16},
    {"channels": 77},
    {"width": 2},
    {"width": 3},
    {"width": 8},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"bias": False},
    {"weight": "transposed"},
    {"weight": "transposed", "dtype": torch.bfloat16},
    {"weight": "every second"},
    {"contiguous": True},
    {"slots": 5},
    {"silu": False},
    {"repeat": 3, "block": 11},
    {"repeat": 2, "block": 16, "channels": 96},
    {"repeat": 3, "block": 32, "channels": 96, "contiguous": True},
    {"repeat": 2, "block": 4, "channels": 40, "silu": False},
    {"repeat": 5, "block": 1, "channels": 20},
    {"repeat": 2, "block": 24, "channels": 48},
    {"block": 3},
]
rows = pytest.mark.parametrize("change", CHANGES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "base")


def make(change: dict | None = None, seed: int = 0, start: int = 0) -> dict:
    """Arguments of the op. x and window lie in wider tensors full of NaN; of the window only the history of slot
    ``start``, rows start+1 … start+W-1, is numbers."""
    c = {**BASE, **(change or {})}
    batch, tokens, channels, width, dtype = c["batch"], c["tokens"], c["channels"], c["width"], c["dtype"]
    margin = 0 if c["contiguous"] else 5
    g = torch.Generator().manual_seed(seed)
    x = torch.full((batch, tokens, channels // c["repeat"] + margin), torch.nan)[..., margin:]
    x[:] = torch.randn(x.shape, generator=g)
    weight = (torch.randn(channels, width, generator=g) * width**-0.5).to(dtype)
    if c["weight"] == "transposed":
        weight = weight.t().contiguous().t()
    elif c["weight"] == "every second":
        weight = weight.repeat_interleave(2, 1)[:, ::2]
    window = torch.full((batch, width - 1 + c["slots"], channels + margin), torch.nan)[..., :channels]
    window[:, start + 1 : start + width] = torch.randn(batch, width - 1, channels, generator=g)
    return {
        "x": x,
        "weight": weight,
        "bias": torch.randn(channels, generator=g) * 0.2 if c["bias"] else None,
        "window": window,
        "start_slot": torch.full((batch,), start, dtype=torch.int32),
        **{name: c[name] for name in ("silu", "repeat", "block")},
    }


def cut(inputs: dict, tokens: slice = slice(None), batch: slice = slice(None), **other: object) -> dict:
    """Views of some tokens and rows."""
    part = {name: inputs[name][batch] for name in ("window", "start_slot")}
    return {**inputs, **part, "x": inputs["x"][batch, tokens], **other}


def copy(inputs: dict, **other: object) -> dict:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} | other


def run(inputs: dict, backend: str, **other: object) -> torch.Tensor:
    return causal_conv1d_verify(**{**inputs, **other}, backend=backend)


def history(inputs: dict) -> torch.Tensor:
    """The W-1 inputs that precede the token after ``start_slot``."""
    width = inputs["weight"].shape[1]
    return torch.stack([w[s + 1 : s + width] for w, s in zip(inputs["window"], inputs["start_slot"], strict=True)])


def repeated(inputs: dict) -> torch.Tensor:
    """x with every channel that is convolved, (B, T, D)."""
    x, block = inputs["x"], inputs["block"] or 1
    return x.reshape(*x.shape[:2], -1, 1, block).expand(-1, -1, -1, inputs["repeat"], -1).flatten(2)


def steps(inputs: dict, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """y and histories (B, T, W-1, D) of T calls of one token that each overwrite what they read: plain decoding."""
    batch, tokens, _ = inputs["x"].shape
    channels = len(inputs["weight"])
    window = torch.cat([torch.full((batch, 1, channels), torch.nan), history(inputs)], 1)  # one slot
    zero, y, histories = torch.zeros(batch, dtype=torch.int32), [], []
    for t in range(tokens):
        y.append(run(cut(inputs, slice(t, t + 1), window=window, start_slot=zero), backend))
        histories.append(window[:, 1:].clone())
    return torch.cat(y, 1), torch.stack(histories, 1)


@rows
def test_error_is_within_twice_that_of_pytorch(change: dict, kernels: str) -> None:
    inputs = make(change)
    x, weight, bias, window, start_slot, silu, repeat, block = copy(inputs).values()
    y_single = run(copy(inputs), "reference")
    bias = None if bias is None else bias.double()
    args = CausalConv1dVerifyArgs(
        x.double(), weight.double(), bias, window.double(), start_slot, 0, silu, repeat, block or 1, left_padding=None,
        final_state_only=False, constant_weights=False,
    )  # fmt: skip
    y_double = reference.causal_conv1d_verify(args)
    assert_accurate(run(inputs, kernels), y_single, y_double, what="y")


@rows
def test_reference_is_a_convolution(change: dict) -> None:
    inputs = make(change)
    whole = torch.cat([history(inputs), repeated(inputs)], 1).double()
    bias = None if inputs["bias"] is None else inputs["bias"].double()
    weight = inputs["weight"].double()[:, None]
    expected = F.conv1d(whole.transpose(1, 2), weight, bias, groups=len(weight)).transpose(1, 2)
    expected = F.silu(expected) if inputs["silu"] else expected
    torch.testing.assert_close(run(inputs, "reference"), expected.float())


@rows
def test_repeated_channels_are_channels_like_any(change: dict, backend: str) -> None:
    inputs = make(change)
    plain = copy(inputs) | {"x": repeated(inputs), "repeat": 1, "block": None}
    y = run(inputs, backend)
    assert y.isfinite().all() and y.is_contiguous()
    assert_bitwise_equal(y, run(plain, backend), "y")
    assert_bitwise_equal(inputs["window"], plain["window"], "window")


@rows
def test_silu_is_applied_to_the_convolution(change: dict, backend: str) -> None:
    inputs = make(change)
    y = run(copy(inputs), backend, silu=True)
    expected = F.silu(run(inputs, backend, silu=False))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)


@rows
def test_one_call_equals_one_token_at_a_time(change: dict, backend: str) -> None:
    inputs = make(change)
    y_steps, histories = steps(inputs, backend)
    assert_bitwise_equal(run(inputs, backend), y_steps, "y")
    for t in range(histories.shape[1]):
        assert_bitwise_equal(history({**inputs, "start_slot": inputs["start_slot"] + t}), histories[:, t], f"slot {t}")


@rows
def test_rows_do_not_see_each_other(change: dict, backend: str) -> None:
    inputs = make(change)
    alone = copy(inputs)
    y = run(inputs, backend)
    for b in range(len(y)):
        one = slice(b, b + 1)
        assert_bitwise_equal(run(cut(alone, batch=one), backend), y[one], f"y of row {b}")
        assert_bitwise_equal(alone["window"][one], inputs["window"][one], f"window of row {b}")


@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
def test_threads_do_not_change_a_bit(final_state_only: bool, backend: str) -> None:
    inputs = make({"channels": 3001, "tokens": 7})
    results = []
    for threads in (1, 2, 4, 4, 4, 3):
        torch.set_num_threads(threads)
        mine = copy(inputs)
        results.append((run(mine, backend, final_state_only=final_state_only), mine["window"]))
    for y, window in results[1:]:
        assert_bitwise_equal(y, results[0][0], "y")
        assert_bitwise_equal(window, results[0][1], "window")


@pytest.mark.parametrize("write_slot", [0, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_only_the_rows_of_the_window_are_written(start: int, write_slot: int, backend: str) -> None:
    inputs = make(start=start)
    snapshot = copy(inputs)
    bases = [inputs[name]._base.clone() for name in ("x", "window")]
    y = run(inputs, backend, write_slot=write_slot)
    assert y.isfinite().all() and y.is_contiguous()
    assert_bitwise_equal(y, steps(snapshot, backend)[0], "y")
    expected = snapshot["window"].clone()
    if write_slot == 0:
        expected[:, :3] = history(snapshot)
    expected[:, 3 + write_slot : 8 + write_slot] = snapshot["x"]
    assert_bitwise_equal(inputs["window"], expected, "window")
    assert_bitwise_equal(inputs["x"]._base, bases[0], "x")
    assert_bitwise_equal(inputs["window"]._base[..., 33:], bases[1][..., 33:], "memory beside the window")
    for name in ("x", "weight", "bias", "start_slot"):
        assert_bitwise_equal(inputs[name], snapshot[name], name)


@pytest.mark.parametrize("accepted", range(5))
def test_every_slot_is_a_place_to_continue_from(accepted: int, backend: str) -> None:
    inputs, more = make(start=7), make(seed=1)
    plain = steps(inputs, backend)[1][:, accepted]
    run(inputs, backend)
    chosen = torch.full((3,), accepted, dtype=torch.int32)
    following = {**more, "weight": inputs["weight"], "window": inputs["window"], "start_slot": chosen}
    assert_bitwise_equal(history(following), plain, "history")
    window = torch.cat([torch.full((3, 1, 33), torch.nan), plain], 1)
    y_plain, histories = steps({**following, "window": window, "start_slot": torch.zeros_like(chosen)}, backend)
    assert_bitwise_equal(run(following, backend), y_plain, "y")
    for t in range(5):
        assert_bitwise_equal(history({**following, "start_slot": chosen * 0 + t}), histories[:, t], f"slot {t}")


@pytest.mark.parametrize("width", [2, 3, 4])
def test_rounds_with_rejections_equal_plain_decoding(width: int, backend: str) -> None:
    inputs = make({"slots": 5, "width": width})
    plain = torch.cat([torch.full((3, 1, 33), torch.nan), history(inputs)], 1)
    zero = torch.zeros(3, dtype=torch.int32)
    for seed, accepted in enumerate([[0, 3, 4], [2, 0, 4], [1, 0, 3], [4, 2, 0]]):
        window = {**inputs, "x": make(seed=seed)["x"]}
        y = run(window, backend)
        for b, count in enumerate(accepted):
            row = slice(b, b + 1)
            one = cut(window, slice(0, count + 1), row, window=plain[row], start_slot=zero[:1])
            y_plain, histories = steps(one, backend)
            assert_bitwise_equal(y[row, : count + 1], y_plain, f"y of row {b} in round {seed}")
            plain[b, 1:] = histories[0, -1]
        inputs["start_slot"].copy_(torch.tensor(accepted))


@pytest.mark.parametrize("nulls", [[1, 0, 0], [0, 5, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("final_state_only", [False, True], ids=["verify", "prefill"])
def test_null_columns_leave_an_empty_history_as_it_was(nulls: list[int], final_state_only: bool, backend: str) -> None:
    inputs = make()
    inputs["window"][:, 1:4] = 0
    alone = copy(inputs)
    y = run(inputs, backend, final_state_only=final_state_only, left_padding=torch.tensor(nulls, dtype=torch.int32))
    for b, null in enumerate(nulls):
        row = slice(b, b + 1)
        inputs_alone = torch.cat([torch.zeros(null + 3, 33), alone["x"][b, null:]])
        if null < 5:
            y_alone, _ = steps(cut(alone, slice(null, None), row), backend)
            assert_bitwise_equal(y[row, null:], y_alone, f"y of row {b}")
        if final_state_only:
            actual, expected = inputs["window"][b, 1:4], inputs_alone[-3:]
        else:
            actual, expected = inputs["window"][b, :8], inputs_alone
        assert_bitwise_equal(actual, expected, f"window of row {b}")


@pytest.mark.parametrize("pieces", [[150], [64, 64, 22], [1, 1, 2, 3, 143], [17] * 8 + [14]], ids=str)
@pytest.mark.parametrize("width", [2, 4])
def test_prefill_equals_verify_wherever_it_is_cut(width: int, pieces: list[int], backend: str) -> None:
    inputs = make({"tokens": 150, "slots": 3, "batch": 1, "width": width})
    y_plain, histories = steps(inputs, backend)
    y, end = [], 0
    for length in pieces:
        y.append(run(cut(inputs, slice(end, end + length)), backend, final_state_only=True))
        end += length
    assert_bitwise_equal(torch.cat(y, 1), y_plain, "y")
    assert_bitwise_equal(history(inputs), histories[:, -1], "rows 1 … W-1")
    assert inputs["window"][:, [0, width, width + 1]].isnan().all(), "prefill writes rows 1 … W-1 only"


def test_start_slot_is_read_at_every_call(backend: str) -> None:
    inputs = make({"slots": 12}, start=11)
    inputs["window"][:, 9:12] = torch.randn(3, 3, 33)
    first = run(inputs, backend)
    inputs["start_slot"].fill_(8)
    second = run(inputs, backend)
    assert not torch.equal(first, second)
    assert_bitwise_equal(second, steps(inputs, backend)[0], "y")


def test_instruction_sets_with_fused_multiply_add_agree(fused_isas: list[str], select_isa: object) -> None:
    for change in CHANGES:
        results = []
        for isa in fused_isas:
            select_isa(isa)
            inputs = make(change)
            results.append((run(inputs, "cpu"), inputs["window"]))
        for y, window in results[1:]:
            assert_bitwise_equal(y, results[0][0], f"y, {change}")
            assert_bitwise_equal(window, results[0][1], f"window, {change}")


@pytest.mark.parametrize(("write_slot", "final_state_only"), [(0, False), (2, False), (0, True)])
def test_null_columns_of_repeated_channels(write_slot: int, final_state_only: bool, backend: str) -> None:
    inputs = make({"channels": 96, "repeat": 2, "block": 4})
    plain = copy(inputs) | {"x": repeated(inputs), "repeat": 1, "block": None}
    other = {"left_padding": torch.tensor([0, 5, 2], dtype=torch.int32), "final_state_only": final_state_only}
    y = run(inputs, backend, write_slot=write_slot, **other)
    assert_bitwise_equal(y, run(plain, backend, write_slot=write_slot, **other), "y")
    assert_bitwise_equal(inputs["window"], plain["window"], "window")


@pytest.mark.parametrize("change", [{}, {"repeat": 3, "block": 11}], ids=str)
def test_blocks_that_do_not_fit_are_refused(change: dict, backend: str) -> None:
    inputs = make(change)
    before = inputs["window"].clone()
    for match, wrong in {
        "repeat needs a block, .* got repeat 3 and block None": {"repeat": 3, "block": None},
        "repeat needs a block, .* got repeat 0 and block 3": {"repeat": 0, "block": 3},
        "repeat needs a block, .* got repeat 1 and block 0": {"repeat": 1, "block": 0},
        r"block 2 times repeat \d does not divide the 33 channels": {"block": 2},
        "weight must be": {"repeat": 2, "block": 11},
    }.items():
        with pytest.raises(ValueError, match=match) as caught:
            run(inputs, backend, **wrong)
        assert "\n" not in str(caught.value)
    assert_bitwise_equal(inputs["window"], before, "written before the error")


@pytest.mark.parametrize("name", ["x", "window", "weight", "bias"])
def test_nan_reaches_exactly_what_depends_on_it(name: str, backend: str) -> None:
    inputs = make()
    place, expected = {
        "x": ((1, 1, 3), (1, slice(1, 5), 3)),
        "window": ((1, 2, 3), (1, slice(0, 2), 3)),  # the middle of the history: two tokens see it
        "weight": ((3, 0), (slice(None), slice(None), 3)),
        "bias": ((3,), (slice(None), slice(None), 3)),
    }[name]
    inputs[name][place] = torch.nan
    reached = torch.zeros(3, 5, 33, dtype=torch.bool)
    reached[expected] = True
    assert_bitwise_equal(run(inputs, backend).isnan(), reached, "NaN")
