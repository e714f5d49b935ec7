"""What the ops that choose tokens refuse as arguments, and what their parameters may be."""

from collections.abc import Callable

import pytest
import torch

from speculative_mamba.ops import sample_tokens, speculative_accept
from speculative_mamba.ops.sampling_params import SamplingParams
from speculative_mamba.ops.sampling_tensors import SamplingTensors
from speculative_mamba.testing.sampling import rng_keys_of, tensors, text_of

OP = "speculative_accept"
NATURAL = SamplingParams(temperature=1.0)
both = pytest.mark.parametrize("function", [sample_tokens, speculative_accept])


def arguments(function: Callable) -> dict:
    """Of three rows, two drafted tokens and seven tokens of a vocabulary."""
    common = {
        "sampling": tensors(NATURAL, 3, 7), "rng_keys": rng_keys_of(3), "positions": torch.arange(3),
        **text_of(torch.zeros(3, 7, dtype=torch.bool)), "draft_tokens": torch.zeros(3, 2, dtype=torch.int64),
        "active": torch.ones(3, dtype=torch.bool), "row_status": torch.zeros(3, dtype=torch.int32),
    }  # fmt: skip
    if function is sample_tokens:
        return {"logits": torch.zeros(3, 7), "probs": torch.empty(3, 7), **common}
    return {
        "logits": torch.zeros(3, 3, 7), "draft_probs": torch.full((3, 2, 7), 1 / 7),
        "num_draft_tokens": torch.ones(3, dtype=torch.int32), **common,
    }  # fmt: skip


def refused(function: Callable, match: str, backend: str, **wrong: object) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        function(**{**arguments(function), **wrong}, backend=backend)
    assert "\n" not in str(caught.value)


TENSORS = [
    (function, name)
    for function in (sample_tokens, speculative_accept)
    for name, value in arguments(function).items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=[f"{f.__name__}-{name}" for f, name in TENSORS])
def test_arguments_that_do_not_fit_are_named(function: Callable, name: str, backend: str) -> None:
    tensor = arguments(function)[name]
    other = r"\bmeta\b" if name == "logits" else rf"\b{name}\b.*\bmeta\b"
    refused(function, other, backend, **{name: tensor.to("meta")})
    refused(function, rf"\b{name}\b", backend, **{name: tensor.to(torch.int16)})
    refused(function, rf"\b{name}\b", backend, **{name: tensor[None]})
    if name != "logits":
        refused(function, rf"\b{name}\b", backend, **{name: torch.cat([tensor, tensor[:1]])})
    refused(function, rf"\b{name}\b.*contiguous", backend, **{name: tensor.repeat_interleave(2, -1)[..., ::2]})


def test_sizes_that_do_not_fit_are_named(backend: str) -> None:
    whole = arguments(speculative_accept)
    for name, match, tensor in (
        ("draft_tokens", "draft_tokens must have shape", whole["draft_tokens"][:, 1:].contiguous()),
        ("draft_probs", "draft_probs must have shape", whole["draft_probs"][:, 1:]),
        ("draft_probs", "draft_probs must have shape", whole["draft_probs"][..., 1:].contiguous()),
        ("logits", r"logits must have shape \(B, K\+1, V\)", whole["logits"][:, :0]),
    ):
        refused(speculative_accept, match, backend, **{name: tensor})


@both
def test_rng_keys_hold_two_numbers(function: Callable, backend: str) -> None:
    for keys in (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)):
        refused(function, r"rng_keys must have shape \(3, 2\)", backend, rng_keys=keys)


def test_num_draft_tokens_are_not_negative(backend: str) -> None:
    counts = torch.tensor([1, -1, 9], dtype=torch.int32)
    refused(speculative_accept, "num_draft_tokens must be at least 0", backend, num_draft_tokens=counts)


@both
@pytest.mark.parametrize("token", [-1, 7])
def test_draft_tokens_are_of_the_vocabulary(function: Callable, token: int, backend: str) -> None:
    drafted = torch.tensor([[0, 1], [token, 2], [3, 4]])
    refused(function, "draft_tokens.*from 0 to 6", backend, draft_tokens=drafted)


@both
@pytest.mark.parametrize("name", ["prompt_mask", "output_counts"])
def test_penalties_need_the_text(function: Callable, name: str, backend: str) -> None:
    for penalty in ({"repetition_penalty": 0.9}, {"presence_penalty": 1}, {"frequency_penalty": -0.1}):
        sampling = tensors(SamplingParams(temperature=1.0, **penalty), 3, 7)
        refused(function, f"penalties need {name}", backend, sampling=sampling, **{name: None})


@both
def test_parameters_are_those_of_the_rows(function: Callable, backend: str) -> None:
    refused(function, r"sampling.temperature must have shape \(3,\)", backend, sampling=tensors(NATURAL, 2, 7))
    refused(function, "sampling must be SamplingTensors", backend, sampling=NATURAL)
    biased = tensors(SamplingParams(logit_bias={7: 1.0}), 3, 8)
    refused(function, "bias_ids must be below 7", backend, sampling=biased)


def fields(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = [SamplingParams(temperature=1.0, presence_penalty=1, logit_bias={3: 1.0, 5: 2.0}), SamplingParams()]
    return SamplingTensors.from_params(rows, 9).tensors() | changed


BAD_TENSORS = [
    ("temperature", torch.tensor([1.0, -1.0])), ("temperature", torch.tensor([1.0, torch.nan])),
    ("temperature", torch.tensor([1.0, 1.0]).double()),
    ("top_k", torch.tensor([0, -1]).int()), ("top_k", torch.tensor([0, 1])), ("top_p", torch.tensor([0.0, 1.0])),
    ("top_p", torch.tensor([0.5, 1.5])), ("min_p", torch.tensor([0.0, 1.0])), ("min_p", torch.tensor([-0.1, 0])),
    ("repetition_penalty", torch.tensor([0.0, 1.0])), ("presence_penalty", torch.tensor([torch.inf, 0])),
    ("frequency_penalty", torch.tensor([torch.nan, 0])), ("frequency_penalty", None),
    ("bias_ids", torch.tensor([[3, 3], [-1, -1]]).int()), ("bias_ids", torch.tensor([[-1, 3], [-1, -1]]).int()),
    ("bias_ids", torch.tensor([[3, -2], [-1, -1]]).int()), ("bias_ids", torch.tensor([[3], [-1]]).int()),
    ("bias_values", torch.tensor([[torch.inf, 0], [0, 0]])), ("bias_values", torch.tensor([[torch.nan, 0], [0, 0]])),
    ("bias_values", None), ("top_p", torch.ones(4)[::2]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_tensors_that_make_no_sense(name: str, value: torch.Tensor | None) -> None:
    SamplingTensors(**fields())
    with pytest.raises(ValueError, match=rf"sampling\.{'bias' if 'bias' in name else name}") as caught:
        SamplingTensors(**fields(**{name: value}))
    assert "\n" not in str(caught.value)


def test_tensors_of_parameters() -> None:
    """A tiny temperature and top-k 1 are greedy, what rounds to a bound stays within it; what no row has is left out,
    unless it is asked for."""
    rows = [SamplingParams(temperature=1e-6), SamplingParams(temperature=2.0, top_k=2**40), SamplingParams(1.0, 1)]
    made = SamplingTensors.from_params(rows, 9)
    assert made.temperature.tolist() == [0, 2, 0] and made.top_k.tolist() == [0, 2**31 - 1, 1]
    assert made.repetition_penalty is None and made.bias_ids is None
    bounds = SamplingTensors.from_params([SamplingParams(1.0, top_p=1e-300, min_p=1 - 1e-16)], 9)
    assert 0 < bounds.top_p.item() < 1e-30 and 0.99999 < bounds.min_p.item() < 1
    roomy = SamplingTensors.from_params(rows, 9, penalties=True, bias_capacity=2)
    assert roomy.repetition_penalty.tolist() == [1] * 3 and roomy.bias_ids.tolist() == [[-1, -1]] * 3
    roomy.set_row(1, SamplingParams(presence_penalty=-1, logit_bias={8: -1}), 9)
    assert roomy.bias_ids.tolist() == [[-1, -1], [8, -1], [-1, -1]] and roomy.bias_values[1].tolist() == [-1, 0]
    assert roomy.temperature.tolist() == [0, 0, 0] and roomy.presence_penalty.tolist() == [0, -1, 0]
    for tensors_of, its, message in (
        (made, SamplingParams(presence_penalty=1), "no memory"), (made, SamplingParams(logit_bias={1: 1}), "no memory"),
        (roomy, SamplingParams(logit_bias={1: 1, 2: 1, 3: 1}), "3 biases"),
        (roomy, SamplingParams(logit_bias={9: 1}), "outside the vocabulary"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tensors_of.set_row(0, its, 9)
    with pytest.raises(ValueError, match=r"^logit_bias of row 1 is for token 9, outside the vocabulary of 9 tokens$"):
        SamplingTensors.from_params([NATURAL, SamplingParams(logit_bias={9: 1.0})], 9)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("presence_penalty", [-2.1, 2.1, float("nan"), True, None, "1"]),
        ("frequency_penalty", [-2.1, 2.1, float("inf"), True, None]),
        ("logit_bias", [{-1: 0.0}, {0.5: 1.0}, {"a": 1.0}, {True: 1.0}, {0: float("nan")}, {0: float("inf")}, {0: "1"},
                        {0: 1e31}, {0: None}, 3, [1], [(0, 1.0), (0, 2.0)], None]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_parameters_out_of_range_are_refused(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name) as caught:
            SamplingParams(**{name: value})
        assert "\n" not in str(caught.value)
    params = SamplingParams(logit_bias={5: -100, 2: float("-inf")})
    assert params.logit_bias == ((2, -torch.inf), (5, -100.0)) and hash(params) is not None
