"""Calls of ops whose kernels are compiled as for a launch, with no GPU to launch them on.

As a program, prints what became of the kernels of each op that it reads: python triton_launches.py STEP ARCHITECTURE …
Of an op's calls it takes every STEP-th.
"""

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module

import torch

from speculative_mamba.ops.commit_tokens import BatchState
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.ops.replay import ReplayBuffer
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors
from speculative_mamba.testing.models import as_dtype

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
ROW = torch.zeros(1, dtype=torch.int32)
# Dtype of activations and of states, size of states, whether inputs are replayed.
STATES = (
    (FLOAT32, FLOAT32, 16, False), (FLOAT32, FLOAT32, 16, True), (FLOAT32, FLOAT32, 128, False),
    (BFLOAT16, BFLOAT16, 16, False), (BFLOAT16, BFLOAT16, 128, True), (BFLOAT16, FLOAT32, 16, True),
)  # fmt: skip


def conv(dtype: torch.dtype, width: int, gated: bool = False) -> tuple:
    x, weight, window = torch.zeros(1, 5, 5120, dtype=dtype), torch.zeros(5120, width), torch.zeros(1, width + 5, 5120)
    gate = x if gated else None
    return x, weight.to(dtype), torch.zeros(5120), window, ROW, 0, gate, gate, not gated, 1, 1, None, False, False


def scan(dtype: torch.dtype, states: torch.dtype, size: int, replay: bool) -> tuple:
    x, B = torch.zeros(1, 5, 5120, dtype=dtype), torch.zeros(1, 5, size, dtype=dtype)
    slots = torch.zeros(1, 1 if replay else 8, 5120, size, dtype=states)
    inputs = ReplayBuffer(torch.zeros(1, 8, 5120), torch.zeros(1, 8, 5120), torch.zeros(1, 8, 1, size))
    A, D = torch.zeros(5120, size), torch.zeros(5120)
    return x, x, A, B, B, D, x, D, slots, ROW, 0, inputs if replay else None, ROW, False, False


def ssd(dtype: torch.dtype, states: torch.dtype, size: int, replay: bool) -> tuple:
    x, dt, B = (torch.zeros(1, 5, *shape, dtype=dtype) for shape in ((80, 64), (80,), (1, size)))
    slots = torch.zeros(1, 1 if replay else 8, 80, 64, size, dtype=states)
    inputs = ReplayBuffer(torch.zeros(1, 8, 80, 64), torch.zeros(1, 8, 80), torch.zeros(1, 8, 1, size))
    A, limits = torch.zeros(80), (0.0, math.inf)
    return x, dt, A, B, B, A, A, slots, ROW, 0, x, limits, inputs if replay else None, ROW, False, False


def norm(dtype: torch.dtype, gate: bool) -> tuple:
    x, residual = torch.zeros(5, 2560, dtype=dtype), torch.zeros(5, 2560)
    return x, torch.zeros(2560, dtype=dtype), None if gate else residual, x if gate else None, 1, 1e-5, 1.0, False


def silu(dtype: torch.dtype) -> tuple:
    return torch.zeros(5, 14336, dtype=dtype), torch.zeros(5, 14336, dtype=dtype), 0


def linear(dtype: torch.dtype, weight: torch.dtype | str, out_dtype: torch.dtype) -> tuple:
    matrix = as_dtype(torch.zeros(2560, 5120), weight)
    return torch.zeros(5, 5120, dtype=dtype), matrix, torch.zeros(2560), 1.0, out_dtype, False


def experts_linear(dtype: torch.dtype, weight: torch.dtype, weighted: bool, num_experts: int) -> tuple:
    experts, matrix = torch.zeros(5, 6, dtype=torch.int32), torch.zeros(1024, 1536, dtype=weight)
    x, weights = torch.zeros(5, 6 if weighted else 1, 1536, dtype=dtype), torch.zeros(5, 6) if weighted else None
    return x, experts, weights, ExpertWeight((matrix,) * num_experts)


def routing(score: int, groups: int) -> tuple:
    return torch.zeros(5, 128), torch.zeros(128) if score else None, 6, score, groups, groups, score == 0, 1e-20, 2.5


def attention(dtype: torch.dtype, cache: torch.dtype, dims: int) -> tuple:
    q, k = torch.zeros(1, 5, 32, dims, dtype=dtype), torch.zeros(1, 5, 8, dims, dtype=dtype)
    keys, lengths = torch.zeros(1, 8, 64, dims, dtype=cache), torch.zeros(1, 8, dtype=torch.int32)
    return q, k, k, keys, keys, lengths, ROW, 0, torch.zeros(dims // 2), 0.1, ROW, False


def accepting(params: SamplingParams, tokens: int, everything: bool) -> tuple:
    """With one token as sample_tokens does it, which leaves the probabilities and tests nothing."""
    logits, seen = torch.zeros(1, tokens, 50280), torch.zeros(1, 50280, dtype=torch.bool)
    row, keys = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    drafted = torch.zeros(1, 4, dtype=torch.int64)
    q, limits = (logits[:, 1:], ROW) if everything and tokens > 1 else (None, None)
    probs = logits[:, 0] if everything and tokens == 1 else None
    active = seen[:, 0] if everything else None
    sampling = SamplingTensors.from_params([params], 50280)
    stops = seen if everything else None
    return logits, drafted, q, sampling, keys, row, False, seen, seen.int(), active, limits, stops, 0, probs


def embedding(table_dtype: torch.dtype, out_dtype: torch.dtype) -> tuple:
    return torch.zeros(1, 5, dtype=torch.int64), torch.zeros(50280, 2560, dtype=table_dtype), out_dtype


def committing(everything: bool) -> tuple:
    draft_tokens, row = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    seen, status = torch.zeros(1, 50280, dtype=torch.bool), torch.zeros(4, 1, dtype=torch.int32)
    state = BatchState(row.repeat(1, 2), row.clone(), ROW.clone(), seen[:, 0], torch.zeros(5, 1, dtype=torch.int32))
    window = draft_tokens, ROW, row, ROW, *((status, ROW) if everything else (None, None))
    return *window, seen, state, *((seen.int(), draft_tokens) if everything else (None, None))


GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.8, repetition_penalty=1.1, logit_bias={7: 1.0})

# op -> the arguments of calls, by function; the most registers are those of a call in an even place
CALLS = {
    "causal_conv1d_verify": [
        (conv, (FLOAT32, 4)), (conv, (BFLOAT16, 4)), (conv, (BFLOAT16, 8)),
        (conv, (BFLOAT16, 3, True)),
    ],
    "commit_tokens": [(committing, (True,)), (committing, (False,))],
    "embed_tokens": [(embedding, (FLOAT32, FLOAT32)), (embedding, (BFLOAT16, BFLOAT16))],
    "expert_linear": [
        (experts_linear, (FLOAT32, BFLOAT16, False, 64)), (experts_linear, (BFLOAT16, BFLOAT16, True, 64)),
        (experts_linear, (BFLOAT16, BFLOAT16, False, 8)),
    ],
    "select_experts": [(routing, (1, 8)), (routing, (0, 1))],
    "mlp_activation": [(silu, (FLOAT32,)), (silu, (BFLOAT16,))],
    "rms_norm": [(norm, (FLOAT32, False)), (norm, (BFLOAT16, False)), (norm, (BFLOAT16, True))],
    "selective_scan_verify": [(scan, states) for states in STATES],
    "ssd_verify": [(ssd, states) for states in STATES],
    "attention_verify": [
        (attention, (FLOAT32, FLOAT32, 64)), (attention, (BFLOAT16, BFLOAT16, 128)),
        (attention, (BFLOAT16, FLOAT32, 256)),
    ],
    "skinny_linear": [
        (linear, (FLOAT32, FLOAT32, FLOAT32)), (linear, (BFLOAT16, BFLOAT16, BFLOAT16)),
        (linear, (BFLOAT16, "q8_0", FLOAT32)), (linear, (BFLOAT16, "q4_0", FLOAT32)),
        (linear, (FLOAT32, BFLOAT16, FLOAT32)),
    ],
    "speculative_accept": [
        (accepting, (SAMPLED, 5, True)), (accepting, (GREEDY, 5, False)), (accepting, (SAMPLED, 1, True)),
    ],
}  # fmt: skip


def compiled(call: Callable[[], object], architecture: int) -> list:
    """The kernels that a call would launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_device(self) -> int:
            return architecture

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

    run, kernels = triton.JITFunction.run, []

    def compile_only(self: triton.JITFunction, *arguments: object, **options: object) -> None:
        kernels.append(run(self, *arguments, **{**options, "warmup": True}))

    triton.runtime.driver.set_active(Driver())
    triton.JITFunction.run = compile_only
    try:
        call()
    finally:
        triton.JITFunction.run = run
    return kernels


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, SHARED."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", listed)}


def report(op: str, step: int, architectures: list[int]) -> list[dict]:
    """What became of the kernels of every ``step``-th call."""
    function, kernels = getattr(import_module(f"speculative_mamba.ops.{op}.triton"), op), []
    for arguments, choice in CALLS[op][::step]:
        call = functools.partial(function, function.__annotations__["args"](*arguments(*choice)))
        for architecture, kernel in ((each, kernel) for each in architectures for kernel in compiled(call, each)):
            about = {"kernel": kernel.metadata.name, "call": str(choice), "architecture": architecture}
            contractible = re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32", kernel.asm["ptx"])
            kernels.append({**about, "contractible": contractible, **resources(kernel.asm["cubin"])})
    return kernels


if __name__ == "__main__":
    step, *architectures = map(int, sys.argv[1:])
    for op in map(str.strip, sys.stdin):
        print(json.dumps(report(op, step, architectures)), flush=True)
