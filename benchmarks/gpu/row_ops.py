"""The ops whose rows know nothing of each other."""

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F

from speculative_mamba.ops import embed_tokens, expert_linear, mlp_activation, rms_norm, select_experts, skinny_linear
from speculative_mamba.ops.block_formats import FORMATS, GROUP
from speculative_mamba.ops.block_weight import BlockWeight
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.testing.tolerance import assert_bitwise_equal

from .work import ACTIVATIONS, Work, activations, assert_near, nbytes


class RowWork(Work):
    @abstractmethod
    def of_rows(self, rows: slice, backend: str) -> torch.Tensor: ...

    def run(self, backend: str) -> torch.Tensor:
        return self.of_rows(slice(None), backend)

    def check(self, backend: str) -> None:
        """Some rows alone have the bits that they have among all, and the values of the reference."""
        y = self.run(backend)
        for row in sorted({0, len(y) // 2, len(y) - 1}):
            alone = slice(row, row + 1)
            assert_bitwise_equal(self.of_rows(alone, backend), y[alone], f"row {row} alone")
            assert_near(y[alone], self.of_rows(alone, "reference"), f"row {row}")


class Linear(RowWork):
    """skinny_linear; PyTorch multiplies by the same weight in bfloat16."""

    def __init__(
        self, in_features: int, out_features: int, rows: int, dtype: torch.dtype | str, out_dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.x, self.out_dtype = activations(device, rows, in_features), out_dtype
        self.wide = activations(device, out_features, in_features) * in_features**-0.5
        self.weight: torch.Tensor | BlockWeight = self.wide
        if isinstance(dtype, str):
            kind = FORMATS[dtype]
            size = -(-out_features // GROUP), kind.group_bytes(in_features)
            data = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
            data[:, : kind.quants_at(in_features)].view(torch.float16).fill_(in_features**-0.5 / 64)
            self.weight = BlockWeight(data, dtype, self.wide.shape)
        self.moved = nbytes(self.x, self.weight) + rows * out_features * out_dtype.itemsize

    def of_rows(self, rows: slice, backend: str) -> torch.Tensor:
        return skinny_linear(self.x[rows], self.weight, out_dtype=self.out_dtype, backend=backend)

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: F.linear(self.x, self.wide)}


class Norm(RowWork):
    """rms_norm with a residual stream."""

    def __init__(self, features: int, rows: int, device: torch.device) -> None:
        self.x, self.weight = activations(device, rows, features), 1 + 0.1 * activations(device, features)
        self.residual = torch.randn(rows, features, device=device)
        self.moved = 2 * nbytes(self.x, self.residual) + self.weight.nbytes

    def of_rows(self, rows: slice, backend: str) -> torch.Tensor:
        return rms_norm(self.x[rows], self.weight, self.residual[rows], backend=backend)[0]

    def baselines(self) -> dict[str, Callable[[], object]]:
        weight = self.weight.float()

        def normed() -> tuple[torch.Tensor, torch.Tensor]:
            residual = self.residual + self.x
            return F.rms_norm(residual, weight.shape, weight, 1e-5).to(self.x.dtype), residual

        return {"torch": normed}


class Embedding(RowWork):
    """embed_tokens, a row of another token each."""

    def __init__(self, vocabulary: int, features: int, rows: int, device: torch.device) -> None:
        self.table = activations(device, vocabulary, features)
        self.tokens = torch.arange(rows, device=device)[:, None] * 7919 % vocabulary
        self.moved = 2 * rows * self.table[0].nbytes

    def of_rows(self, rows: slice, backend: str) -> torch.Tensor:
        return embed_tokens(self.tokens[rows], self.table, out_dtype=self.table.dtype, backend=backend)

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: F.embedding(self.tokens[:, 0], self.table)}


class MlpActivation(RowWork):
    def __init__(self, features: int, rows: int, device: torch.device) -> None:
        self.gate, self.up = (activations(device, rows, features) for _ in range(2))
        self.moved = 3 * self.gate.nbytes

    def of_rows(self, rows: slice, backend: str) -> torch.Tensor:
        return mlp_activation(self.gate[rows], self.up[rows], backend=backend)

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: F.silu(self.gate) * self.up}


class SelectExperts(RowWork):
    """select_experts, softmax over those that are chosen."""

    def __init__(self, experts: int, top_k: int, rows: int, device: torch.device) -> None:
        self.logits, self.top_k = torch.randn(rows, experts, device=device), top_k
        self.moved = self.logits.nbytes + 8 * rows * top_k

    def of_rows(self, rows: slice, backend: str) -> torch.Tensor:
        return select_experts(self.logits[rows], top_k=self.top_k, backend=backend)[0]

    def baselines(self) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: self.logits.topk(self.top_k).values.softmax(-1)}


class ExpertLinear(RowWork):
    """expert_linear, whose tokens choose experts in turn; PyTorch goes from expert to expert, as transformers does."""

    def __init__(
        self, in_features: int, out_features: int, experts: int, top_k: int, rows: int, device: torch.device
    ) -> None:
        self.x = activations(device, rows, 1, in_features)
        self.weights = activations(device, experts, out_features, in_features) * in_features**-0.5
        self.weight = ExpertWeight(tuple(self.weights))
        chosen = torch.arange(rows * top_k, dtype=torch.int32, device=device) % experts
        self.experts, self.chosen = chosen.view(rows, top_k), min(rows * top_k, experts)
        read = self.chosen * out_features * in_features * ACTIVATIONS.itemsize
        self.moved = read + nbytes(self.x, self.experts) + rows * top_k * out_features * ACTIVATIONS.itemsize

    def of_rows(self, rows: slice, backend: str) -> torch.Tensor:
        return expert_linear(self.x[rows], self.experts[rows], None, self.weight, backend=backend)

    def baselines(self) -> dict[str, Callable[[], object]]:
        def one_by_one() -> torch.Tensor:
            y = self.x.new_empty(*self.experts.shape, self.weights.shape[1])
            for expert in range(self.chosen):
                token, choice = torch.where(self.experts == expert)
                y[token, choice] = F.linear(self.x[token, 0], self.weights[expert])
            return y

        return {"torch": one_by_one}
