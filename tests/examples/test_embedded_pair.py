"""The training kernels, forward and backward, against plain PyTorch in float64."""

import shutil

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("training compiles its kernels with g++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        from examples.embedded_pair import scan
    return scan


def gated_scan(u, raw, bc, skip, z):
    states = bc.shape[-1] // 2
    A, dt = -torch.arange(1, states + 1, dtype=u.dtype), F.softplus(raw)
    state, y = torch.zeros(len(u), u.shape[-1], states, dtype=u.dtype), []
    for t in range(u.shape[1]):
        B, C = bc[:, t, None, :states], bc[:, t, None, states:]
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * B
        y.append((state * C).sum(-1) + skip * u[:, t])
    return torch.stack(y, 1) * F.silu(z)


def conv_silu(x, weight, bias):
    return F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight, bias, groups=len(weight))).mT


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def check(kernel, plain, *inputs: torch.Tensor) -> None:
    """Results and the gradient of every input, to a few float32 roundings of the largest value."""
    single = [x.clone().requires_grad_() for x in inputs]
    double = [x.double().requires_grad_() for x in inputs]
    actual, expected = kernel(*single), plain(*double)
    weights = torch.randn(expected.shape)
    (actual * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    pairs = [(actual, expected), *((a.grad, b.grad) for a, b in zip(single, double, strict=True))]
    for index, (a, b) in enumerate(pairs):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < 5e-6, f"{'result' if index == 0 else f'gradient of input {index - 1}'}: {error:.1e}"


@pytest.mark.parametrize("length", [1, 16, 37])
def test_gated_scan(scan, length):
    torch.manual_seed(length)
    per_token = [torch.randn(3, length, 48) for _ in range(3)]
    u, raw, z = per_token[0], per_token[1] - 1, per_token[2]
    check(lambda *x: scan.GatedScan.apply(*x, None), gated_scan, u, raw, torch.randn(3, length, 32), torch.randn(48), z)


@pytest.mark.parametrize("length", [1, 3, 37])
def test_conv_silu(scan, length):
    torch.manual_seed(length)
    check(scan.ConvSiLU.apply, conv_silu, torch.randn(3, length, 48), torch.randn(48, 1, 4), torch.randn(48))


def test_rms_norm(scan):
    torch.manual_seed(0)
    check(lambda x, w: scan.RMSNorm.apply(x, w, 1e-5), rms_norm, torch.randn(3, 5, 48), torch.randn(48))
