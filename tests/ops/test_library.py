"""The ops as PyTorch operators: checked, traced and exported, with the bits of direct calls."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from speculative_mamba import ops
from speculative_mamba.ops.block_weight import quantized
from speculative_mamba.ops.commit_tokens import BatchState
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.ops.noise import Purpose
from speculative_mamba.ops.replay import ReplayBuffer
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors

B, T, D, N, V = 2, 3, 8, 4, 20
ROW = torch.zeros(B, dtype=torch.int32)
KEYS, POSITIONS = torch.arange(2 * B).reshape(B, 2), torch.full((B,), 5)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def selective_scan(**options: object) -> dict:
    x, group = normal(B, T, D), normal(B, T, N)
    states = normal(B, 1 if "inputs" in options else 5, D, N)
    return {
        "x": x, "dt": x, "A": -normal(D, N).abs(), "B": group, "C": group, "D": normal(D), "z": x, "dt_bias": normal(D),
        "states": states, "start_slot": ROW, **options,
    }  # fmt: skip


def ssd(**options: object) -> dict:
    x, group, head = normal(B, T, 2, D), normal(B, T, 1, N), normal(2)
    return {
        "x": x, "dt": normal(B, T, 2), "A": -head.abs(), "B": group, "C": group, "D": head, "dt_bias": head,
        "states": normal(B, 5, 2, D, N), "start_slot": ROW, **options,
    }  # fmt: skip


def replay_buffer() -> ReplayBuffer:
    return ReplayBuffer(normal(B, 5, D), torch.zeros(B, 5, D), normal(B, 5, 1, N))


def attention() -> dict:
    new = normal(B, T, 1, D)
    cache = normal(B, 1, 16, D)
    return {
        "q": normal(B, T, 2, D), "k": new, "v": new, "keys": cache, "values": cache.clone(),
        "lengths": torch.full((B, 5), 4, dtype=torch.int32), "start_slot": ROW, "inv_freq": normal(D // 2).abs(),
    }  # fmt: skip


def sampling(*params: SamplingParams) -> dict:
    counts = torch.zeros(B, V, dtype=torch.int32)
    its = SamplingTensors.from_params(params, V)
    return {
        "sampling": its,
        "rng_keys": KEYS,
        "positions": POSITIONS,
        "prompt_mask": counts > 0,
        "output_counts": counts,
    }


MIXED = SamplingParams(), SamplingParams(temperature=0.8, top_k=5, repetition_penalty=1.2, logit_bias={3: 1.0})


def accepting() -> dict:
    probs = normal(B, T - 1, V).softmax(-1)
    status = torch.full((B,), 9, dtype=torch.int32)
    return {
        "logits": normal(B, T, V), "draft_tokens": probs.argmax(-1), "draft_probs": probs, "row_status": status,
        **sampling(*MIXED),
    }  # fmt: skip


def committing() -> dict:
    state = BatchState.empty(B, T, "cpu")
    state.admit(0, [1, 2, 3], 9)
    return {
        "draft_tokens": torch.ones(B, T - 1, dtype=torch.int64), "accepted": ROW + 1, "next_token": POSITIONS,
        "row_status": ROW, "draft_status": None, "num_draft_tokens": None,
        "is_stop": torch.zeros(B, V, dtype=torch.bool), "state": state,
        "output_counts": torch.zeros(B, V, dtype=torch.int32),
    }  # fmt: skip


CALLS: dict[str, tuple[Callable, Callable[[], dict]]] = {
    "attention": (ops.attention_verify, attention),
    "commit": (ops.commit_tokens, committing),
    "convolution": (
        ops.causal_conv1d_verify,
        lambda: {
            "x": normal(B, T, D), "weight": normal(D, 4), "bias": normal(D), "window": normal(B, 8, D),
            "start_slot": ROW,
        },
    ),
    "embedding": (
        ops.embed_tokens, lambda: {"tokens": torch.tensor([[1, 2], [0, 1]]), "table": normal(V, D).bfloat16()}
    ),
    "experts": (
        ops.expert_linear,
        lambda: {
            "x": normal(T, 1, D), "experts": torch.tensor([[0, 2], [1, 2], [2, 0]], dtype=torch.int32),
            "expert_weights": None, "weight": ExpertWeight(tuple(normal(3, N, D))),
        },
    ),
    "experts, summed": (
        ops.expert_linear,
        lambda: {
            "x": normal(T, 2, D), "experts": torch.tensor([[0, 2], [1, 2], [2, 0]], dtype=torch.int32),
            "expert_weights": normal(T, 2), "weight": ExpertWeight(tuple(normal(3, N, D))),
        },
    ),
    "linear": (ops.skinny_linear, lambda: {"x": normal(T, D), "weight": normal(N, D).bfloat16(), "y_scale": 0.5}),
    "linear, quantised": (ops.skinny_linear, lambda: {"x": normal(T, 64), "weight": quantized(normal(N, 64), "q8_0")}),
    "mlp": (ops.mlp_activation, lambda: {"gate": normal(T, D), "up": normal(T, D)}),
    "norm": (ops.rms_norm, lambda: {"x": normal(T, D), "weight": normal(D), "residual": normal(T, D)}),
    "router": (ops.select_experts, lambda: {"logits": normal(T, D), "top_k": 2, "score": "sigmoid"}),
    "sample": (
        ops.sample_tokens,
        lambda: {"logits": normal(B, V), "purpose": Purpose.DRAFT, "probs": normal(B, V), **sampling(*MIXED)},
    ),
    "selective scan": (ops.selective_scan_verify, selective_scan),
    "selective scan, replay": (ops.selective_scan_verify, lambda: selective_scan(inputs=replay_buffer())),
    "speculative accept": (ops.speculative_accept, accepting),
    "ssd": (ops.ssd_verify, lambda: ssd(z=normal(B, T, 2, D), dt_limit=(0.01, 0.5))),
}  # fmt: skip


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, tuple | list) and not dataclasses.is_dataclass(value):
        return []
    parts = (
        vars(value).values() if dataclasses.is_dataclass(value) else value if isinstance(value, tuple | list) else ()
    )
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.fixture(params=CALLS)
def call(request) -> tuple[Callable, dict]:
    op, arguments = CALLS[request.param]
    return op, arguments()


def test_opcheck(call) -> None:
    op, arguments = call
    torch.library.opcheck(getattr(torch.ops.speculative_mamba, op.__name__).default, op.operator.arguments(**arguments))


def test_compiled(call) -> None:
    torch.compiler.reset()
    op, arguments = call
    expected = copy.deepcopy(arguments)
    results = tensors(torch.compile(op, fullgraph=True, backend="aot_eager")(**arguments))
    for actual, wanted in zip(results, tensors(op(**expected)), strict=True):
        assert torch.equal(actual, wanted)
    for actual, wanted in zip(tensors(list(arguments.values())), tensors(list(expected.values())), strict=True):
        assert torch.equal(actual, wanted)


def test_exported() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.norm = (torch.nn.Parameter(normal(*shape), False) for shape in ((D, D), (D,)))

        def forward(self, x: torch.Tensor, window: torch.Tensor, start_slot: torch.Tensor) -> torch.Tensor:
            normed, residual = ops.rms_norm(ops.skinny_linear(x.flatten(0, 1), self.weight), self.norm)
            taps = torch.ones(D, 4)
            return ops.causal_conv1d_verify((normed + residual).view_as(x), taps, None, window, start_slot)

    arguments = normal(B, T, D), normal(B, 8, D), ROW
    exported = torch.export.export(Layer(), copy.deepcopy(arguments)).module()
    expected = copy.deepcopy(arguments)
    assert torch.equal(exported(*arguments), Layer()(*expected))
    assert torch.equal(arguments[1], expected[1])


def test_gradients_are_refused() -> None:
    weight = normal(N, D).requires_grad_()
    arguments = ops.skinny_linear.operator.arguments(normal(T, D), weight)
    with pytest.raises(ValueError, match=r"^weight requires grad, which the kernels of skinny_linear cannot give"):
        torch.ops.speculative_mamba.skinny_linear(*arguments)
    with torch.no_grad():
        torch.ops.speculative_mamba.skinny_linear(*arguments)
    torch.compiler.reset()
    with pytest.raises(Exception, match="weight requires grad, which the kernels of skinny_linear cannot give"):
        torch.compile(ops.skinny_linear, fullgraph=True, backend="aot_eager")(normal(T, D), weight)


def test_every_op_is_an_operator() -> None:
    assert {op.__name__ for op, _ in CALLS.values()} == set(ops.__all__)
