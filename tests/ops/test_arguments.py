"""What does not fit is refused with the argument's name, before anything is written."""

import pytest
import torch

from speculative_mamba.ops import causal_conv1d_verify, rms_norm, selective_scan_verify, skinny_linear, ssd_verify

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
    refused(op, "null_columns", null_columns=torch.zeros(B + 1, dtype=torch.int32), backend=backend)
    refused(op, "null_columns", null_columns=torch.zeros(B, dtype=torch.int64), backend=backend)
    OPS[op](**arguments(op), write_slot=S - T, backend=backend)
    name, slots = ("window", slice(0, W)) if op == "conv" else ("states", slice(0, 1))
    one_slot = {name: arguments(op)[name][:, slots].contiguous()}
    refused(op, "5 tokens.*1 slots", **one_slot, backend=backend)
    OPS[op](**{**arguments(op), **one_slot}, keep_last=True, backend=backend)


@pytest.mark.parametrize("op", ["scan", "ssd", "conv"])
def test_window_without_tokens(op: str, backend: str) -> None:
    per_token = [name for name in ("x", "dt", "z", "B", "C") if name in arguments(op)]
    refused(op, "at least one token", **{name: arguments(op)[name][:, :0] for name in per_token}, backend=backend)


@pytest.mark.parametrize("op", ["scan", "ssd", "conv"])
def test_prefill_goes_to_slot_0(op: str, backend: str) -> None:
    refused(op, "write_slot must be 0", keep_last=True, write_slot=1, backend=backend)


@pytest.mark.parametrize("width", [0, 1, 9])
def test_conv_width(width: int, backend: str) -> None:
    refused("conv", "weight.*taps", weight=torch.randn(D, width), backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend(op: str) -> None:
    refused(op, "unknown backend 'gpu'; choose from: auto, cpu, cuda, triton, reference", backend="gpu")
