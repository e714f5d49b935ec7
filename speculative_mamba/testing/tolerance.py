"""When is a kernel right?"""

import torch

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensors") -> None:
    """Equal bits, whatever the dtype: +0 and -0 differ. One NaN equals another, as sign and payload of a NaN are the
    processor's choice and carry no meaning. Shows the first place that differs.

    Raises:
        AssertionError: they differ in shape, dtype or a bit.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"{what}: {tuple(actual.shape)} {actual.dtype} against {tuple(expected.shape)} {expected.dtype}"
    )
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    word = _WORDS[actual.element_size()]
    equal = actual.view(word) == expected.view(word)
    if actual.is_floating_point():
        equal |= actual.float().isnan() & expected.float().isnan()
    if not equal.all():
        where = tuple((~equal).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int((~equal).sum())} of {equal.numel()} values differ, first at {where}: "
            f"{actual[where].item()!r} against {expected[where].item()!r}"
        )


def assert_accurate(
    actual: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor, factor: float = 2.0, what: str = "kernel"
) -> None:
    """The kernel's largest error against float64 is at most ``factor`` times that of PyTorch in the same dtype.

    Where PyTorch happens to be exact, one unit in the last place of the largest value is allowed.

    Raises:
        AssertionError: it is larger.
    """
    error = (actual.double() - exact).abs().max().item()
    allowed = (reference.double() - exact).abs().max().item()
    unit = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    bound = factor * max(allowed, unit)
    assert error <= bound, f"{what}: error {error:.3e}, PyTorch's own {allowed:.3e}, bound {bound:.3e}"
