"""How tokens of a batch are chosen: a value per row of every parameter, on the rows' device."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from .sampling_params import SamplingParams

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_BIAS = ("bias_ids", "bias_values")
_MAX_TOP_K = 2**31 - 1
_LEAST_TOP_P, _MOST_MIN_P = 2.0**-126, 1 - 2.0**-24  # what is beyond them would round to 0 and 1


@dataclass(frozen=True)
class SamplingTensors:
    """``SamplingParams`` of every row, as ops take them. What they mean is told there.

    | field | shape | dtype | notes |
    |-------|-------|-------|-------|
    | temperature | (B) | float32 | 0: greedy |
    | top_k | (B) | int32 | 0: all tokens |
    | top_p | (B) | float32 | 1: all tokens |
    | min_p | (B) | float32 | 0: all tokens |
    | repetition_penalty | (B) | float32, None | None, like the next two: no row has a penalty |
    | presence_penalty | (B) | float32, None | |
    | frequency_penalty | (B) | float32, None | |
    | bias_ids | (B, N) | int32, None | token ids, each at most once a row; behind the last -1 |
    | bias_values | (B, N) | float32, None | added to the logits of ``bias_ids`` |

    All are contiguous. Values are data: a recorded or captured call sees what ``set_row`` has put there, greedy and
    sampled rows alike. Which fields are None, and N, are not.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit, or on the CPU a value.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition_penalty: torch.Tensor | None = None
    presence_penalty: torch.Tensor | None = None
    frequency_penalty: torch.Tensor | None = None
    bias_ids: torch.Tensor | None = None
    bias_values: torch.Tensor | None = None

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        vocabulary: int,
        device: torch.device | str = "cpu",
        *,
        penalties: bool = False,
        bias_capacity: int = 0,
    ) -> "SamplingTensors":
        """A row for each of ``params``.

        penalties: keep tensors for penalties even if no row has one. bias_capacity: N at least.

        Raises:
            ValueError: a bias is for a token outside the vocabulary; it names the row.
        """
        for row, its in enumerate(params):
            _check_bias(its, vocabulary, row)

        def column(values: list[object], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device="cpu").to(device)

        penalties = penalties or any(its.penalised for its in params)
        rows = [_values(its, penalties) for its in params]
        names = _values(SamplingParams(), penalties)
        made = {name: column([values[name] for values in rows], _dtype(name)) for name in names}
        if width := max([bias_capacity, *(len(its.logit_bias) for its in params)]):
            padded = [[*its.logit_bias, *[(-1, 0.0)] * (width - len(its.logit_bias))] for its in params]
            made["bias_ids"] = column([[token for token, _ in pairs] for pairs in padded], torch.int32)
            made["bias_values"] = column([[value for _, value in pairs] for pairs in padded])
        return cls(**made)

    def set_row(self, row: int, params: SamplingParams, vocabulary: int) -> None:
        """Other parameters for one row, in place.

        Raises:
            ValueError: a bias is for a token outside the vocabulary, or there are no tensors for its penalties, or none
                that are wide enough for its biases. Nothing was written.
        """
        _check_bias(params, vocabulary, row)
        biased = len(params.logit_bias)
        if (params.penalised and not self.has_penalties) or biased > self.bias_capacity:
            raise ValueError(f"there is no memory for the penalties of row {row}, or for its {biased} biases")
        for name, value in _values(params, self.has_penalties).items():
            getattr(self, name)[row] = value
        if self.bias_ids is not None:
            self.bias_ids[row], self.bias_values[row] = -1, 0
        if biased:
            ids, values = zip(*params.logit_bias, strict=True)
            self.bias_ids[row, :biased] = self.bias_ids.new_tensor(ids)
            self.bias_values[row, :biased] = self.bias_values.new_tensor(values)

    def __post_init__(self) -> None:
        rows, device = self.temperature.shape, self.temperature.device
        for name in (*_PENALTIES, *_BIAS):
            group = _PENALTIES if name in _PENALTIES else _BIAS
            if (getattr(self, name) is None) != (getattr(self, group[0]) is None):
                raise ValueError(f"sampling.{' and sampling.'.join(group)} must be given together, or none of them")
        for name, tensor in self.tensors().items():
            dtype = _dtype(name)
            shape = (*rows, self.bias_capacity) if name in _BIAS else rows
            if len(rows) != 1 or tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
                wanted = "(B, N)" if name in _BIAS else "(B)"
                raise ValueError(
                    f"sampling.{name} must be {dtype} of shape {wanted} on the device of the others, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"sampling.{name} must be contiguous, got strides {tensor.stride()}")
        if device.type == "cpu":
            self._check_values()

    def _check_values(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0) & (self.temperature <= 1e30),
            "top_k": self.top_k >= 0,
            "top_p": (self.top_p > 0) & (self.top_p <= 1),
            "min_p": (self.min_p >= 0) & (self.min_p < 1),
        }
        if self.has_penalties:
            ranges["repetition_penalty"] = (self.repetition_penalty > 0) & self.repetition_penalty.isfinite()
            ranges["presence_penalty"] = self.presence_penalty.isfinite()
            ranges["frequency_penalty"] = self.frequency_penalty.isfinite()
        if self.bias_capacity:
            ids = self.bias_ids
            in_order = ids.sort(dim=-1, descending=True).values
            repeated = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
            ranges["bias_ids"] = (ids >= -1).all(-1) & ~((ids[:, :-1] < 0) & (ids[:, 1:] >= 0)).any(-1)
            ranges["bias_ids"] &= ~repeated.any(-1)
            ranges["bias_values"] = (self.bias_values < torch.inf).all(-1)  # NaN is not
        for name, fits in ranges.items():
            if not fits.all():
                row = int((~fits).nonzero()[0])
                raise ValueError(f"sampling.{name} is out of range in row {row}: {getattr(self, name)[row].tolist()}")

    @property
    def rows(self) -> int:
        return self.temperature.shape[0]  # len() of a tensor takes five times as long

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty is not None

    @property
    def bias_capacity(self) -> int:
        """N."""
        return 0 if self.bias_ids is None else self.bias_ids.shape[-1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def rows_of(self, rows: slice) -> "SamplingTensors":
        """Those of some rows, as views."""
        return SamplingTensors(**{name: value[rows] for name, value in self.tensors().items()})


def _dtype(name: str) -> torch.dtype:
    return torch.int32 if name in ("top_k", "bias_ids") else torch.float32


def _values(params: SamplingParams, penalties: bool) -> dict[str, float]:
    """What a row has of each parameter but for biases."""
    values = {
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_k": min(params.top_k, _MAX_TOP_K),
        "top_p": max(params.top_p, _LEAST_TOP_P),
        "min_p": min(params.min_p, _MOST_MIN_P),
    }
    return values | {name: getattr(params, name) for name in _PENALTIES if penalties}


def _check_bias(params: SamplingParams, vocabulary: int, row: int) -> None:
    for token, _ in params.logit_bias:
        if token >= vocabulary:
            raise ValueError(
                f"logit_bias of row {row} is for token {token}, outside the vocabulary of {vocabulary} tokens"
            )
