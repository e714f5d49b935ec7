"""What does not fit is refused with the argument's name, before anything is written."""

import pytest
import torch
from cases import ATTENTION, WINDOWS
from cases import OPS as ALL
from description import Op

from speculative_mamba import ops
from speculative_mamba.ops import causal_conv1d_verify, rms_norm, selective_scan_verify, skinny_linear, ssd_verify
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors
from speculative_mamba.testing.models import random_model, tiny_config

B, T, D, N, W, S = 3, 5, 33, 7, 4, 8
H, G, P = 6, 2, 21


def arguments(op: str) -> dict:
    start_slot = torch.zeros(B, dtype=torch.int32)
    if op == "scan":
        per_token = {k: torch.randn(B, T, D) for k in ("x", "dt", "z")} | {k: torch.randn(B, T, N) for k in "BC"}
        fixed = {"A": -torch.rand(D, N), "D": torch.randn(D), "dt_bias": torch.randn(D)}
        return {**per_token, **fixed, "states": torch.randn(B, S, D, N), "start_slot": start_slot}
    if op == "ssd":
        per_token = {"x": torch.randn(B, T, H, P), "dt": torch.randn(B, T, H), "z": torch.randn(B, T, H, P)}
        per_token |= {k: torch.randn(B, T, G, N) for k in "BC"}
        fixed = {"A": -torch.rand(H), "D": torch.randn(H), "dt_bias": torch.randn(H)}
        return {**per_token, **fixed, "states": torch.randn(B, S, H, P, N), "start_slot": start_slot}
    if op == "conv":
        window = torch.randn(B, W - 1 + S, D)
        return {"x": torch.randn(B, T, D), "weight": torch.randn(D, W), "bias": torch.randn(D), "window": window,
                "start_slot": start_slot}  # fmt: skip
    if op == "linear":
        return {"x": torch.randn(B, D), "weight": torch.randn(N, D)}
    return {"x": torch.randn(B, D), "weight": torch.randn(D), "residual": torch.randn(B, D)}


OPS = {
    "scan": selective_scan_verify, "ssd": ssd_verify, "conv": causal_conv1d_verify, "linear": skinny_linear,
    "norm": rms_norm,
}  # fmt: skip
TENSORS = [(op, name) for op in OPS for name in arguments(op)]
tensors = pytest.mark.parametrize(("op", "name"), TENSORS, ids=[f"{op}-{name}" for op, name in TENSORS])


def refused(op: str, match: str, **wrong: object) -> None:
    kwargs = {**arguments(op), **wrong}
    written = {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    with pytest.raises(ValueError, match=match) as caught:
        OPS[op](**kwargs)
    assert "\n" not in str(caught.value)
    for name, before in written.items():
        assert torch.equal(kwargs[name], before), f"{name} was written before the error"


@tensors
def test_dtype(op: str, name: str, backend: str) -> None:
    refused(op, rf"\b{name}\b", **{name: arguments(op)[name].double(), "backend": backend})


@tensors
def test_device(op: str, name: str, backend: str) -> None:
    # Where x is the odd one out, the message names the first tensor that is not with it.
    refused(
        op,
        r"\bmeta\b" if name == "x" else rf"\b{name}\b.*\bmeta\b",
        **{name: arguments(op)[name].to("meta"), "backend": backend},
    )


@tensors
def test_number_of_dimensions(op: str, name: str, backend: str) -> None:
    refused(op, rf"\b{name}\b", **{name: arguments(op)[name][None], "backend": backend})


@pytest.mark.parametrize(("op", "name"), [t for t in TENSORS if t[1] != "x"], ids=str)
def test_shape(op: str, name: str, backend: str) -> None:
    tensor = arguments(op)[name]
    # A weight of one feature more, or a row more than the batch has.
    dim = 1 if (op, name) == ("linear", "weight") else 0
    longer = torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
    refused(op, rf"\b{name}\b", **{name: longer, "backend": backend})


@pytest.mark.parametrize(
    ("op", "name"), [t for t in TENSORS if t != ("conv", "weight")], ids=[str(t) for t in TENSORS][1:]
)
def test_strides(op: str, name: str, backend: str) -> None:
    gaps = arguments(op)[name].repeat_interleave(2, -1)[..., ::2]
    refused(op, rf"\b{name}\b.*contiguous", **{name: gaps, "backend": backend})


@pytest.mark.parametrize(
    ("op", "name"), [("scan", "A"), ("scan", "states"), ("ssd", "states"), ("norm", "residual")], ids=str
)
def test_gaps_between_rows(op: str, name: str, backend: str) -> None:
    tensor = arguments(op)[name]
    gaps = torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    refused(op, rf"\b{name}\b.*contiguous|contiguous.*\b{name}\b", **{name: gaps, "backend": backend})


@pytest.mark.parametrize("op", ["scan", "ssd", "conv"])
def test_slots(op: str, backend: str) -> None:
    refused(op, "slot", write_slot=-1, backend=backend)
    refused(op, "slot.*8 slots", write_slot=S - T + 1, backend=backend)
    for slot in (-2, S):
        refused(op, "start_slot", start_slot=torch.tensor([0, slot, 0], dtype=torch.int32), backend=backend)
    refused(op, "left_padding", left_padding=torch.zeros(B + 1, dtype=torch.int32), backend=backend)
    refused(op, "left_padding", left_padding=torch.zeros(B, dtype=torch.int64), backend=backend)
    OPS[op](**arguments(op), write_slot=S - T, backend=backend)
    name, slots = ("window", slice(0, W)) if op == "conv" else ("states", slice(0, 1))
    one_slot = {name: arguments(op)[name][:, slots].contiguous()}
    refused(op, "5 tokens.*1 slots", **one_slot, backend=backend)
    OPS[op](**{**arguments(op), **one_slot}, final_state_only=True, backend=backend)


@pytest.mark.parametrize("op", ["scan", "ssd", "conv"])
def test_window_without_tokens(op: str, backend: str) -> None:
    per_token = [name for name in ("x", "dt", "z", "B", "C") if name in arguments(op)]
    refused(op, "at least one token", **{name: arguments(op)[name][:, :0] for name in per_token}, backend=backend)


@pytest.mark.parametrize("op", ["scan", "ssd", "conv"])
def test_prefill_goes_to_slot_0(op: str, backend: str) -> None:
    refused(op, "write_slot must be 0", final_state_only=True, write_slot=1, backend=backend)


@pytest.mark.parametrize("width", [0, 1, 9])
def test_conv_width(width: int, backend: str) -> None:
    refused("conv", "weight.*taps", weight=torch.randn(D, width), backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend(op: str) -> None:
    refused(op, "unknown backend 'gpu'; choose from: auto, cpu, cuda, triton, reference", backend="gpu")


class Other:
    """Memory with a written tensor of an op, and something else of that memory."""

    def __init__(self, op: Op) -> None:
        self.arguments, self.call = op.make({"contiguous": True}), getattr(ops, op.name)

    def refused(self, match: str, **wrong: object) -> None:
        arguments = {**self.arguments, **wrong}
        before = {name: tensor.clone() for name, tensor in arguments.items() if torch.is_tensor(tensor)}
        with pytest.raises(ValueError, match=match) as caught:
            self.call(**arguments)
        assert "\n" not in str(caught.value)
        for name, tensor in before.items():
            assert torch.equal(arguments[name].nan_to_num(), tensor.nan_to_num()), f"{name} was written"


@pytest.mark.ops(*WINDOWS)
def test_what_is_written_does_not_share_memory(op: Op) -> None:
    """With itself, as an expanded tensor or a sliding window does, with what is read, or with what else is written."""
    other = Other(op)
    for name in op.written:
        tensor = other.arguments[name]
        shape, strides = tensor.shape, list(tensor.stride())
        expanded = tensor[:1].clone().expand(shape)
        other.refused(rf"^{name} (is written, so its elements|must be contiguous)", **{name: expanded})
        strides[0] -= 1
        sliding = tensor.clone().as_strided(shape, strides)
        other.refused(rf"^{name} (is written, so its elements|must be contiguous)", **{name: sliding})
        for read in set(other.arguments) - {name}:
            theirs = other.arguments[read]
            if torch.is_tensor(theirs) and tensor.dtype == theirs.dtype and theirs.numel() < tensor.numel():
                at = torch.zeros(tensor.numel(), dtype=tensor.dtype)
                wrong = {name: at.view(shape), read: at[-theirs.numel() :].view(theirs.shape)}
                other.refused(rf"is written, so it must not share memory with ({name}|{read})", **wrong)


def test_rows_in_the_gaps_of_others_share_nothing() -> None:
    """Keys and values of one buffer; states of two layers in turns."""
    other = Other(ATTENTION)
    expected, arguments = other.call(**other.arguments), Other(ATTENTION).arguments
    both = torch.stack([arguments["keys"], arguments["values"]], 1)
    y = other.call(**{**arguments, "keys": both[:, 0], "values": both[:, 1]})
    assert torch.equal(y, expected)
    other.refused("keys is written.* share memory with values", keys=both[:, 0], values=both[:, 0])
    one_off = both.flatten()[1:].as_strided(both[:, 0].shape, both[:, 0].stride())
    other.refused("keys is written.* share memory with values", keys=both[:, 0], values=one_off)


def test_row_status_and_probs_are_apart() -> None:
    logits, keys, at = torch.randn(2, 9), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    sampling = SamplingTensors.from_params([SamplingParams(temperature=1.0)] * 2, 9)
    for wrong, match in (
        ({"probs": logits}, "probs is written.* share memory with logits"),
        ({"probs": torch.zeros(1, 9).expand(2, 9)}, "probs is written, so its elements"),
        ({"row_status": torch.zeros(1, dtype=torch.int32).expand(2)}, "row_status"),
        ({"row_status": at.view(torch.int32)[::2]}, "row_status"),
    ):
        with pytest.raises(ValueError, match=match):
            ops.sample_tokens(logits, sampling, keys, at, **wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "q8_0"], ids=str)
@pytest.mark.parametrize("place", ["cpu", "reference"])
def test_token_ids_of_any_integer_dtype(dtype: torch.dtype, place: str) -> None:
    model, start = random_model(tiny_config(d_model=32), dtype=dtype, backend=place), torch.zeros(1, dtype=torch.int32)
    expected = model.verify(torch.tensor([[7, 60]]), model.new_cache(1, 2), start)
    for integer in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16):
        y = model.verify(torch.tensor([[7, 60]]).to(integer), model.new_cache(1, 2), start)
        assert torch.equal(y, expected), integer
    for integer in (torch.int8, torch.int16, torch.int32, torch.int64):
        for token in (-1, 61, 127):
            cache, ids = model.new_cache(1, 2), torch.tensor([[3, token]], dtype=integer)
            for method, others in ((model.verify, (cache, start)), (model.prefill, (cache, 0))):
                with pytest.raises(ValueError, match=r"^tokens must hold token ids from 0 to 60, got"):
                    method(ids if method == model.verify else ids[0], *others)
    for wrong in (torch.tensor([[1.0]]), torch.tensor([[True]])):
        with pytest.raises(ValueError, match="tokens must be of an integer dtype"):
            model.verify(wrong, model.new_cache(1, 2), start)
    with pytest.raises(ValueError, match=r"^tokens must have shape \(B, T\), got \(1,\)"):
        model.verify(torch.tensor([7]), model.new_cache(1, 2), start)
    for wrong in ("ab", ["a"], [[1, 2]], [[1], [2, 3]], [2**70], torch.tensor([[1]]), [None]):
        with pytest.raises(ValueError, match=r"^tokens must be a list of token ids, got"):
            model.prefill(wrong, model.new_cache(1, 2), 0)


@pytest.mark.ops(*ALL)
def test_what_requires_grad_is_refused_by_name(op: Op) -> None:
    """Outside of ``no_grad``; the specification may be differentiated."""
    arguments = op.make()
    for name, tensor in arguments.items():
        if name in op.written or not torch.is_tensor(tensor) or not tensor.is_floating_point():
            continue
        wrong = {name: tensor.detach().clone().requires_grad_()}
        with pytest.raises(ValueError, match=rf"^{name} requires grad, .*{op.name}.*no_grad") as caught:
            op.run(arguments, "cpu", **wrong)
        assert "\n" not in str(caught.value)
        with torch.no_grad():
            op.run(op.copy(arguments), "cpu", **wrong)


def test_the_specification_has_gradients() -> None:
    gate, up = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    ops.mlp_activation(gate, up, backend="reference").sum().backward()
    assert gate.grad is not None and up.grad is not None
