"""Linear layers of experts: matrices wherever they lie, tokens that share experts, and what does not fit."""

import copy
import math
import pickle

import pytest
import torch
from cases import EXPERT_LINEAR

from speculative_mamba.ops import expert_linear, skinny_linear
from speculative_mamba.ops.block_formats import FORMATS
from speculative_mamba.ops.block_weight import BlockWeight
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.testing.blocks import random_blocks
from speculative_mamba.testing.tolerance import assert_bitwise_equal

SHAPE = (6, 10, 40)  # E, N, K


def matrices(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_product_has_the_bits_of_skinny_linear(cpu: str) -> None:
    """Whether other tokens share the expert or not."""
    weight, x = matrices(torch.bfloat16), torch.randn(9, 1, SHAPE[2])
    experts = torch.tensor([[e % 6, (e * e + 1) % 6] for e in range(9)], dtype=torch.int32)
    y = expert_linear(x, experts, None, ExpertWeight(tuple(weight)), backend=cpu)
    for m, chosen in enumerate(experts.tolist()):
        for j, expert in enumerate(chosen):
            assert_bitwise_equal(y[m, j], skinny_linear(x[m], weight[expert], backend=cpu)[0])


@pytest.mark.parametrize("format", FORMATS)
def test_a_product_with_blocks_has_the_bits_of_skinny_linear(cpu: str, format: str) -> None:
    """Also a weighted sum, whose products are added in the order of experts. 40 rows: a part of a group."""
    N, K = 40, 512
    raw = [random_blocks(N, K, format, seed) for seed in range(6)]
    weight = ExpertWeight.of_blocks([BlockWeight.from_gguf(part, format, K) for part in raw])
    x, expert_weights = torch.randn(9, 2, K), torch.rand(9, 2)
    experts = torch.tensor([[e % 6, (e * e + 1) % 6] for e in range(9)], dtype=torch.int32)
    y = expert_linear(x, experts, None, weight, backend=cpu)
    summed = expert_linear(x, experts, expert_weights, weight, backend=cpu)
    for m, chosen in enumerate(experts.tolist()):
        total, size = torch.zeros(N), torch.zeros(N)
        for expert, j in sorted((expert, j) for j, expert in enumerate(chosen)):
            assert_bitwise_equal(y[m, j], skinny_linear(x[m, j : j + 1], weight[expert], backend=cpu)[0])
            product = expert_weights[m, j] * y[m, j]
            total, size = total + product, size + product.abs()
        assert ((summed[m, 0] - total).abs() <= 2**-23 * size).all()  # the kernel may round a product and a sum as one
    exact = expert_linear(x, experts, expert_weights, weight, backend="reference")
    assert (summed - exact).norm() < 1e-6 * exact.norm()
    copied = pickle.loads(pickle.dumps(weight))
    assert_bitwise_equal(expert_linear(x, experts, None, copied, backend=cpu), y)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_bitwise_equal(expert_linear(x[:1], experts[:1], None, weight, backend=cpu), y[:1])


def test_experts_in_blocks_of_two_formats_are_refused() -> None:
    first, second = (BlockWeight.from_gguf(random_blocks(16, 64, format), format, 64) for format in ("q8_0", "q4_0"))
    with pytest.raises(ValueError, match=r"^experts must be in blocks of one format and shape$"):
        ExpertWeight.of_blocks([first, second])


def test_gpus_have_no_kernels_for_experts_in_blocks(gpu_kernels: str) -> None:
    weight = ExpertWeight.of_blocks([BlockWeight.from_gguf(random_blocks(16, 64, "q8_0"), "q8_0", 64)])
    with pytest.raises(ValueError, match=r"has no kernels for experts in blocks; load them as bfloat16$"):
        expert_linear(torch.ones(1, 1, 64), torch.zeros(1, 1).int(), None, weight, backend=gpu_kernels)


def test_an_expert_that_is_chosen_twice_counts_twice(backend: str) -> None:
    weight, x = ExpertWeight(tuple(matrices())), torch.randn(2, 1, SHAPE[2])
    experts, weights = torch.tensor([[4, 4], [1, 4]], dtype=torch.int32), torch.tensor([[0.5, 0.25], [0.75, 0.0]])
    y = expert_linear(x, experts, weights, weight, backend=backend)
    torch.testing.assert_close(y[0], 0.75 * x[0] @ weight.matrices[4].T)
    torch.testing.assert_close(y[1], 0.75 * x[1] @ weight.matrices[1].T)


def test_matrices_lie_where_they_are(backend: str) -> None:
    """In one tensor, in halves of one, in reverse, each by itself."""
    whole, x = matrices(), torch.randn(3, 1, SHAPE[2])
    both = torch.cat([torch.full_like(whole, math.nan), whole], 1)
    experts = torch.tensor([[0, 5], [3, 0], [2, 1]], dtype=torch.int32)
    expected = expert_linear(x, experts, None, ExpertWeight(tuple(whole)), backend=backend)
    for parts in (both[:, SHAPE[1] :], whole.flip(0).contiguous().unbind()[::-1], [part.clone() for part in whole]):
        assert_bitwise_equal(expert_linear(x, experts, None, ExpertWeight(tuple(parts)), backend=backend), expected)


def test_a_nan_of_one_expert_reaches_those_who_chose_it(backend: str) -> None:
    arguments = EXPERT_LINEAR.make({"rows": 4, "num_experts": 5, "weighted": True})
    arguments["experts"] = torch.tensor([[0, 1, 2], [1, 2, 3], [3, 0, 1], [2, 1, 0]], dtype=torch.int32)
    whole = torch.randn(5, 37, 77)
    whole[0, 7, 76] = math.nan
    y = EXPERT_LINEAR.run(arguments | {"weight": ExpertWeight(tuple(whole))}, backend)
    expected = torch.zeros(y.shape, dtype=torch.bool)
    expected[[0, 2, 3], 0, 7] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda weight: pickle.loads(pickle.dumps(weight))])
def test_a_copy_knows_its_own_memory(copied) -> None:
    weight, x, experts = ExpertWeight(tuple(matrices())), torch.randn(1, 1, SHAPE[2]), torch.tensor([[5]]).int()
    other, expected = copied(weight), expert_linear(x, experts, None, weight)
    weight.matrices[5].fill_(math.nan)
    assert_bitwise_equal(expert_linear(x, experts, None, other), expected)


def test_a_matrix_with_other_memory_is_found() -> None:
    weight, x, experts = ExpertWeight(tuple(matrices())), torch.randn(1, 1, SHAPE[2]), torch.tensor([[5]]).int()
    weight.matrices[5].data = matrices(seed=1)[2].clone()
    assert_bitwise_equal(expert_linear(x, experts, None, weight)[0], skinny_linear(x[0], weight.matrices[5]))


def test_an_expert_that_requires_grad_is_refused() -> None:
    weight = ExpertWeight(tuple(matrices().requires_grad_()))
    with pytest.raises(ValueError, match=r"^weight.matrices requires grad"):
        expert_linear(torch.zeros(1, 1, SHAPE[2]), torch.zeros(1, 1).int(), None, weight, backend="cpu")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "an ExpertWeight needs at least one matrix"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), "experts must be float matrices of one shape"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).bfloat16()), "experts must be float matrices of one shape"),
        ((torch.zeros(3),), "experts must be float matrices of one shape"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)[:, :3]), "rows of all experts must be equally far apart"),
    ],
)
def test_experts_that_differ_are_refused(parts: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        ExpertWeight(parts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(2, 40)}, r"x must be \(M, J, K\)"),
        ({"x": torch.zeros(2, 2, 40)}, "x must hold 1 row or 3 for each token"),
        ({"x": torch.zeros(2, 1, 41)}, "x must have shape"),
        ({"experts": torch.zeros(2, 3)}, "experts must be torch.int32"),
        ({"experts": torch.tensor([[0, 1, 6]] * 2).int()}, "experts must be from 0 to 5, got"),
        ({"experts": torch.tensor([[0, 1, -1]] * 2).int()}, "experts must be from 0 to 5, got"),
        ({"experts": torch.zeros(2, 6).int()[:, ::2]}, "experts must be contiguous"),
        ({"expert_weights": torch.zeros(2, 2)}, "expert_weights must have shape"),
        ({"weight": torch.zeros(SHAPE)}, "weight must be an ExpertWeight, got Tensor"),
        ({"weight": ExpertWeight(tuple(torch.zeros(SHAPE).int()))}, "weight must be torch.float32 or"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused(wrong: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 1, 40), "experts": torch.zeros(2, 3).int(), "expert_weights": None}
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        expert_linear(**arguments | {"weight": ExpertWeight(tuple(matrices()))} | wrong)
    assert "\n" not in str(caught.value)
