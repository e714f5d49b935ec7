"""The router against the formulas of the families, ties, NaN, and numbers that do not fit."""

import pytest
import torch

from speculative_mamba.ops import select_experts

LOGITS = 2 * torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def test_top_k_then_softmax(backend: str) -> None:
    """Granite: the softmax of the chosen logits alone."""
    weights, experts = select_experts(LOGITS, top_k=4, backend=backend)
    best, expected = LOGITS.topk(4)
    torch.testing.assert_close(weights, best.softmax(-1))
    assert torch.equal(experts, expected.int())


def test_sigmoid_with_bias_and_groups(backend: str) -> None:
    """Nemotron 3: of each token's best two groups, a group being as good as its best two experts."""
    bias, options = torch.linspace(-1, 1, 12), {"top_k": 3, "score": "sigmoid", "groups": 4, "top_k_groups": 2}
    weights, experts = select_experts(LOGITS, bias, **options, epsilon=0.5, scale=2.0, backend=backend)
    for row, (weight, chosen) in enumerate(zip(weights, experts.tolist(), strict=True)):
        scores = LOGITS[row].sigmoid()
        choice = (scores + bias).tolist()
        groups = [range(first, first + 3) for first in range(0, 12, 3)]
        best = sorted(groups, key=lambda group: -sum(sorted(choice[e] for e in group)[1:]))[:2]
        expected = sorted((e for group in best for e in group), key=lambda e: -choice[e])[:3]
        assert chosen == expected
        torch.testing.assert_close(weight, 2 * scores[chosen] / (scores[chosen].sum() + 0.5))


def test_equals_and_nan(backend: str) -> None:
    """Of equals the first, of zeros of either sign too; a NaN is chosen, so that it is not lost."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, -0.0, 0.0, -1.0], [1.0, 5.0, torch.nan, 3.0]])
    weights, experts = select_experts(logits, top_k=2, score="sigmoid", backend=backend)
    assert experts.tolist() == [[1, 2], [0, 1], [2, 1]]
    assert weights[:2].isfinite().all() and weights[2].isnan().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 13}, "top_k must be from 1 to 12"),
        ({"top_k": 0}, "top_k must be from 1 to 12"),
        ({"groups": 5}, "12 experts cannot be 5 equal groups"),
        ({"groups": 12}, "12 experts cannot be 12 equal groups of at least two"),
        ({"groups": 4, "top_k_groups": 5}, "top_k_groups must be from 1 to 4"),
        ({"groups": 4, "top_k_groups": 1, "top_k": 4}, "top_k must be from 1 to 3"),
        ({"score": "tanh"}, "score must be one of softmax, sigmoid, got 'tanh'"),
        ({"logits": LOGITS[0]}, "logits must be a matrix"),
        ({"logits": torch.zeros(1, 1025)}, "there must be 1 to 1024 experts, got 1025"),
        ({"logits": LOGITS.double()}, "logits must be torch.float32"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        select_experts(**{"logits": LOGITS, "top_k": 3} | wrong)
    assert "\n" not in str(caught.value)
