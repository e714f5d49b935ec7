"""Byte-level Mamba for training on the CPU. Same mathematics and parameter names as HF ``MambaForCausalLM``.

A is fixed at its initial value, A[d, n] = -(n + 1), which the scan in ``scan.cpp`` relies on.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.embedded_pair.scan import STATES, TAPS, ConvSiLU, GatedScan, RMSNorm

VOCABULARY = 256
EPSILON = 1e-5


@dataclass(frozen=True)
class Size:
    """Width of the residual stream, number of blocks, rank of the time step projection."""

    hidden: int
    layers: int
    dt_rank: int

    @property
    def inner(self) -> int:
        return 2 * self.hidden


class Cache:
    """One layer's memory, float32: window (rows, 3, inner), what the convolution saw last; state (rows, 16, inner)."""

    def __init__(self, rows: int, inner: int):
        self.window = torch.zeros(rows, TAPS - 1, inner)
        self.state = torch.zeros(rows, STATES, inner)

    def copy(self) -> "Cache":
        copied = Cache.__new__(Cache)
        copied.window, copied.state = self.window, self.state.clone()
        return copied


SIZES = {"target": Size(192, 16, 12), "draft": Size(160, 2, 10)}


class Norm(nn.Module):
    """RMSNorm of (rows, length, width) float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return RMSNorm.apply(x, self.weight, EPSILON)


class Mixer(nn.Module):
    """Mamba mixer: (rows, length, hidden) float32 -> the same."""

    def __init__(self, size: Size):
        super().__init__()
        inner = size.inner
        self.rank = size.dt_rank
        self.in_proj = nn.Linear(size.hidden, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, TAPS, groups=inner)
        self.x_proj = nn.Linear(inner, size.dt_rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(size.dt_rank, inner)
        self.out_proj = nn.Linear(inner, size.hidden, bias=False)
        self.D = nn.Parameter(torch.ones(inner))
        self.register_buffer("A_log", torch.arange(1.0, STATES + 1).log().repeat(inner, 1))
        nn.init.normal_(self.in_proj.weight, std=size.hidden**-0.5)
        nn.init.normal_(self.x_proj.weight, std=inner**-0.5)
        nn.init.normal_(self.out_proj.weight, std=inner**-0.5 / math.sqrt(2 * size.layers))
        nn.init.uniform_(self.dt_proj.weight, -(size.dt_rank**-0.5), size.dt_rank**-0.5)
        dt = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_proj.bias.data = dt + torch.log(-torch.expm1(-dt))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        value, gate = (functional.linear(x, weight) for weight in self.in_proj.weight.chunk(2))
        if cache is None:
            u, state = ConvSiLU.apply(value, self.conv1d.weight, self.conv1d.bias), None
        else:
            joined, state = torch.cat([cache.window, value], 1), cache.state
            u = ConvSiLU.apply(joined, self.conv1d.weight, self.conv1d.bias)[:, TAPS - 1 :].contiguous()
            cache.window = joined[:, 1 - TAPS :]
        dt, bc = self.x_proj(u).split([self.rank, 2 * STATES], -1)
        return self.out_proj(GatedScan.apply(u, self.dt_proj(dt), bc.contiguous(), self.D, gate, state))


class Block(nn.Module):
    """Norm and mixer; the residual is added by ``ByteMamba``."""

    def __init__(self, size: Size):
        super().__init__()
        self.norm = Norm(size.hidden)
        self.mixer = Mixer(size)


class Backbone(nn.Module):
    """Embedding, blocks and final norm, under HF's names."""

    def __init__(self, size: Size):
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, size.hidden)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm_f = Norm(size.hidden)
        nn.init.normal_(self.embeddings.weight, std=0.05)


class ByteMamba(nn.Module):
    """Tied-embedding Mamba over bytes."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.backbone = Backbone(size)

    @property
    def parameter_count(self) -> int:
        """Weights in the exported file: trained ones and A_log."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def forward(self, tokens: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """tokens (rows, length) int64 -> logits (rows, length, 256) float32.

        With ``caches`` (no gradients) the text continues what they have seen, and they move on.
        """
        x = self.backbone.embeddings(tokens)
        for block, cache in zip(self.backbone.layers, caches or [None] * self.size.layers, strict=True):
            x = x + block.mixer(block.norm(x), cache)
        return functional.linear(self.backbone.norm_f(x), self.backbone.embeddings.weight)

    def new_caches(self, rows: int) -> list[Cache]:
        return [Cache(rows, self.size.inner) for _ in self.backbone.layers]

    @torch.no_grad()
    def generate(self, prompts: Tensor, count: int, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
        """prompts (rows, length) int64 -> text (rows, length + count), logits (rows, length + count - 1, 256).

        Logits at i are those for text at i + 1. Greedy at temperature 0.
        """
        caches = self.new_caches(len(prompts))
        logits = [self(prompts, caches)]
        text = [prompts]
        for _ in range(count):
            last = logits[-1][:, -1]
            if temperature:
                text.append(torch.multinomial(torch.softmax(last / temperature, -1), 1))
            else:
                text.append(last.argmax(-1, keepdim=True))
            logits.append(self(text[-1], caches))
        return torch.cat(text, 1), torch.cat(logits[:-1], 1)


def save(model: ByteMamba, path: Path, **extra: object) -> None:
    """Writes size, weights and ``extra`` to ``path`` through a temporary file."""
    scratch = path.with_suffix(".tmp")
    torch.save({"size": asdict(model.size), "model": model.state_dict(), **extra}, scratch)
    scratch.replace(path)


def load(path: Path) -> tuple[ByteMamba, dict]:
    """Reads what ``save`` wrote: the model and the whole record."""
    record = torch.load(path, map_location="cpu", weights_only=True)
    model = ByteMamba(Size(**record["size"]))
    model.load_state_dict(record["model"])
    return model, record
