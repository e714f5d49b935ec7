"""exp, softplus and SiLU, seen through a scan of one token with one state per channel.

Catches: one term fewer in exp or softplus.
"""

import pytest
import torch
import torch.nn.functional as F

from speculative_mamba.ops import selective_scan_verify
from speculative_mamba.testing.tolerance import assert_bitwise_equal

POINTS = 20001


def one_token(dt: torch.Tensor, A: torch.Tensor, state: float) -> dict:
    """One token, one state per channel, with x = B = C = 1, so that state ← exp(Δ A) state + Δ."""
    channels = len(dt)
    one = torch.ones(1, 1, channels)
    return {
        "x": one,
        "dt": dt[None, None],
        "A": A[:, None].clone(),
        "B": torch.ones(1, 1, 1),
        "C": torch.ones(1, 1, 1),
        "D": torch.zeros(channels),
        "z": one * 50,
        "dt_bias": torch.zeros(channels),
        "states": torch.full((1, 1, channels, 1), state),
        "start_slot": torch.zeros(1, dtype=torch.int32),
    }


def run(inputs: dict, backend: str) -> torch.Tensor:
    return selective_scan_verify(**inputs, backend=backend)


def worst_relative_error(function: str, backend: str) -> float:
    if function == "exp":  # softplus(30) is 30, so the state 1 becomes exp(30 A)
        inputs = one_token(dt=torch.full((POINTS,), 30.0), A=-torch.linspace(0, 2.9, POINTS), state=1.0)
        inputs["x"] = torch.zeros(1, 1, POINTS)
        exact = (30 * inputs["A"][:, 0]).double().exp()
    elif function == "softplus":
        dt = torch.linspace(-60, 60, POINTS)
        inputs, exact = one_token(dt=dt, A=-torch.ones(POINTS), state=0.0), F.softplus(dt.double(), threshold=1000)
    else:
        z = torch.linspace(-80, 80, POINTS)
        inputs, exact = one_token(dt=z, A=torch.zeros(POINTS), state=1.0), F.silu(z.double())
        inputs |= {"x": torch.zeros(1, 1, POINTS), "z": z[None, None]}
    y = run(inputs, backend)
    actual = (y[0, 0] if function == "silu" else inputs["states"][0, 0, :, 0]).double()
    return ((actual - exact).abs() / exact.abs().clamp_min(1e-300)).max().item()


@pytest.mark.parametrize("function", ["exp", "softplus", "silu"])
def test_relative_error_is_within_twice_that_of_pytorch(function: str, cpu: str) -> None:
    error, allowed = worst_relative_error(function, cpu), worst_relative_error(function, "reference")
    assert error <= 2 * allowed, f"{error:.2e}, PyTorch's own {allowed:.2e}"


def test_extreme_arguments_saturate(backend: str) -> None:
    dt = torch.tensor([-1e4, -200.0, -100.0, 100.0, 1e4])
    inputs = one_token(dt=dt, A=torch.full((5,), -1e4), state=3.0)
    y = run(inputs, backend)
    state = inputs["states"][0, 0, :, 0]
    torch.testing.assert_close(state, torch.tensor([3.0, 3.0, 3.0, 100.0, 1e4]), rtol=1e-6, atol=0)
    assert_bitwise_equal(y, state[None, None] * 50, "gate of 50 is the identity")
    inputs = one_token(dt=dt, A=torch.full((5,), -1e4), state=3.0) | {"z": torch.full((1, 1, 5), -200.0)}
    assert run(inputs, backend).abs().max() < 1e-30
