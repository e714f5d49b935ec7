"""PyTorch's operations in recorded steps on the CPU, which are run again by numpy where that gives the same bits."""

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.ops import recording
from speculative_mamba.testing.models import random_model, tiny_config
from speculative_mamba.testing.tolerance import assert_bitwise_equal

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*INTEGERS, torch.bool, torch.uint16, torch.bfloat16, torch.float32)
NUMBERS = (
    0, 1, 2, -1, 127, 128, -128, 255, 256, -129, 40000, 2**31, -(2**63), 2**63 - 1,
    True, 0.5, -0.0, 2.0, 1e40, float("inf"), float("nan"),
)  # fmt: skip


def values(dtype: torch.dtype, shift: int) -> torch.Tensor:
    """(24): the extremes and what lies around zero; NaN, infinities and both zeros where there are any."""
    if dtype == torch.bool:
        found = torch.arange(24) % 3 > 0
    elif dtype.is_floating_point:
        some = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 1.5, -2.25, 1e4, 3e-5, 7.0, -1.0]
        found = torch.tensor(some * 2, dtype=torch.float64).to(dtype)
    else:
        limits = torch.iinfo(dtype)
        some = [limits.min, limits.min + 1, limits.max, limits.max - 1, 0, 1, 2, 3, limits.max // 2, 5, 100, 7]
        found = torch.tensor(some * 2, dtype=dtype)
    return torch.cat([found[shift:], found[:shift]])


def calls(function: Callable) -> Iterator[tuple[str, tuple, dict]]:
    """A name, arguments and options of each kind."""
    for one, other, out in itertools.product(DTYPES, DTYPES, DTYPES):
        if len({one, other, out}) == 3:
            continue
        first, second, result = values(one, 0), values(other, 5), torch.zeros(24, dtype=out)
        name = f"{one} {other} {out}"
        if function is torch.Tensor.copy_:
            yield name, (result, first), {}
        elif function is torch.cat:
            for dim, shape in ((0, (6, 4)), (-1, (3, 8))):
                yield name, ((first[:12].view(3, 4), second[12:].view(3, 4)), dim), {"out": result.view(shape)}
            yield f"{name} empty", ((first[:0], first.view(4, 6)), 0), {"out": result.view(4, 6)}
            yield f"{name} list", ([first[:12], second[12:]], 0), {"out": result}
            yield f"{name} default", ((first[:12], second[12:]),), {"out": result}
        else:
            yield name, (first, second), {"out": result}
            yield f"{name} broadcast", (first.view(4, 6), second[:6]), {"out": result.view(4, 6)}
            yield f"{name} in place", (first, second), {"out": first}
            yield f"{name} scalars", (first[2].clone(), second[5].clone()), {"out": result[0].clone()}
            if one == other and function in (torch.add, torch.sub):
                yield f"{name} alpha", (first, second), {"out": result, "alpha": 3}
    if function in (torch.add, torch.sub, torch.lt):
        for dtype, number, out in itertools.product(DTYPES, NUMBERS, (None, torch.int32, torch.bool)):
            first = values(dtype, 3)
            yield f"{dtype} {number}", (first, number), {"out": torch.zeros(24, dtype=out or dtype)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", recording._NUMPY, ids=lambda function: function.__name__)
def test_numpy_gives_the_bits_of_pytorch(function: Callable) -> None:
    """Of every dtype and number that PyTorch takes. Catches: -1 beside unsigned numbers, numbers that a dtype does not
    hold, casts that numpy refuses, options that it does not know."""
    by_numpy = 0
    for name, arguments, options in calls(function):
        theirs, their_options = copy.deepcopy((arguments, options))
        try:
            function(*theirs, **their_options)
        except (RuntimeError, OverflowError, TypeError):
            continue  # so it cannot be recorded
        recording._on_host(function, arguments, options)()
        results = (mine.get("out", given[0]) for mine, given in ((options, arguments), (their_options, theirs)))
        assert_bitwise_equal(*results, name)
        by_numpy += recording._is_same_in_numpy(function, arguments, options)
    assert by_numpy >= len(INTEGERS)


def test_what_rounds_call_is_run_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a dtype of a round's tensors that numpy is not trusted with."""
    target, draft = (random_model(tiny_config(), seed=seed) for seed in (0, 1))
    checked, is_same = [], recording._is_same_in_numpy
    monkeypatch.setattr(
        recording, "_is_same_in_numpy", lambda *call: checked.append((call[0], is_same(*call))) or checked[-1][1]
    )
    sampling = sm.SamplingParams(temperature=1.0, frequency_penalty=0.5)
    sm.generate(target, [[1, 2]], draft=draft, max_new_tokens=9, sampling=sampling)
    assert {function for function, _ in checked} == set(recording._NUMPY)
    assert all(same for _, same in checked)
