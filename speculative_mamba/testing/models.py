"""Random models of any shape, and a model whose probabilities are a table."""

import functools
import math
from collections.abc import Sequence

import torch

from ..models.builder import build
from ..models.config import (
    AttentionConfig,
    ExpertsConfig,
    GroupedMamba1Config,
    Mamba2Config,
    MlpConfig,
    ModelConfig,
    ShortConvConfig,
    mamba1_config,
)
from ..models.formats import Names, parse_config
from ..models.formats.fields import rotary_frequencies
from ..models.language_model import MambaLM
from ..ops import backend as backends
from ..ops.block_weight import BlockWeight, can_quantize, quantized
from ..ops.expert_weight import ExpertWeight
from .hybrids import HYBRIDS

# Published Mamba-1 shapes: (d_model, n_layer); vocabulary 50,280, d_state 16, d_conv 4.
SHAPES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
# Published Mamba-2 shapes: the same, with heads of 64 channels and d_state 128.
MAMBA2_SIZES = {"130m": "130m", "370m": "370m", "780m": "790m", "1.3b": "1.4b", "2.7b": "2.8b"}
MAMBA2_SHAPES = {f"mamba2-{name}": SHAPES[size] for name, size in MAMBA2_SIZES.items()}
# Kinds of tiny models: the blocks of one of each.
ARCHITECTURES = (
    "mamba1", "falcon-mamba", "mamba2", "llama", "mamba2attn", "mamba-in-llama", "mamba2-in-llama", "granite-hybrid",
    "parallel", "lfm2", "experts",
)  # fmt: skip


def published_config(name: str) -> ModelConfig:
    """A published shape: of ``SHAPES``, of ``MAMBA2_SHAPES``, of ``HYBRIDS``, or "hybrid", half of the layers of the
    paper's hybrid of Llama 3 8B, in which Mamba-2 layers stand for three of four attention layers."""
    if name in HYBRIDS:
        return parse_config(HYBRIDS[name])[0]
    if name == "hybrid":
        return hybrid_config(16, 4)
    if name in MAMBA2_SHAPES:
        d_model, n_layer = MAMBA2_SHAPES[name]
        return ModelConfig(d_model, 50288, (mamba2_block(2 * d_model // 64, 64, 128),) * n_layer)
    d_model, n_layer = SHAPES[name]
    return mamba1_config(d_model, n_layer, 50280)


def mamba2_block(heads: int, head_dim: int, d_state: int, groups: int = 1, **other: object) -> Mamba2Config:
    sizes = {"x_heads": heads, "b_groups": groups, "c_groups": groups, "norm_groups": groups, **other}
    return Mamba2Config(heads, head_dim, d_state, **sizes)


def hybrid_config(layers: int, every: int) -> ModelConfig:
    """Llama 3 8B's sizes, ``layers`` layers of which every ``every``-th attends and the others are Mamba-2's."""
    attention = AttentionConfig(32, 8, 128, tuple(rotary_frequencies(500000.0, 128).tolist()))
    mixer = Mamba2Config(32, 128, 128, 8, 8, 32, norm_groups=32)
    blocks = ((attention if i % every == every - 1 else mixer, MlpConfig(14336)) for i in range(layers))
    return ModelConfig(4096, 128256, sum(blocks, ()), tie_embeddings=False)


def tiny_config(**other: int) -> ModelConfig:
    return mamba1_config(**{"d_model": 24, "n_layer": 2, "vocab_size": 61, "d_state": 5, "dt_rank": 3, **other})


def tiny_architecture(kind: str, seed: int = 0, d: int = 24) -> ModelConfig:
    """A tiny untied model of one of ``ARCHITECTURES``, d wide; seeds differ in some of its options."""
    odd = seed % 2 == 1
    mamba1 = tiny_config(d_model=d, n_layer=1).blocks[0]
    normed = tiny_config(d_model=d, n_layer=1, norm_eps=1e-6, weighted_norms=odd, bias=odd).blocks[0]
    mamba2 = mamba2_block(6, 8, 9, groups=2, norm=not odd, D_has_head_dim=odd, bias=odd)
    rotary = tuple(rotary_frequencies(10000.0, 6).tolist())
    attention = AttentionConfig(4, 2, 10, rotary, bias=odd, out_bias=odd)
    convolved = AttentionConfig(6, 3, 8, rotary[:2], scale=0.3 if odd else None, bias=True, d_conv=4)
    grouped = GroupedMamba1Config(24, 12, 3, d_state=4, repeat_before_conv=not odd)
    in_llama = Mamba2Config(6, 4, 4, 3, 3, 6, norm_groups=6, repeat_before_conv=odd)
    granite = mamba2_block(6, 8, 9, groups=1 + odd)
    unturned = AttentionConfig(4, 2, 6, () if odd else rotary[:3], scale=0.21)
    short = ShortConvConfig(40 if odd else 24, d_conv=3 + odd, bias=odd)
    mlp, squared = MlpConfig(37, bias=odd), MlpConfig(30, bias=odd, activation="relu2", gated=odd, gate_multiplier=0.6)
    factors = (0.6, 1.3, 0.8, 1.4, 0.7)
    falcon = mamba2_block(6, 8, 9, groups=2, gate_first=odd, bias=odd, in_multiplier=1.2, multipliers=factors)
    chosen = {"score": "sigmoid", "bias": True, "groups": 4, "top_k_groups": 3, "epsilon": 1e-20, "scale": 2.5}
    chosen |= {"activation": "relu2", "gated": False}
    routed = ExpertsConfig(12, 4, 10, **chosen) if odd else ExpertsConfig(8, 3, 13)  # as Nemotron 3 does, as Granite
    plain = ExpertsConfig(5, 2, 12, normalize=False)
    blocks = {
        "mamba1": (mamba1, mamba1),
        "falcon-mamba": (normed, normed),  # odd: Jamba's
        "mamba2": (mamba2, mamba2),
        "llama": (attention, mlp, attention, mlp),
        "mamba2attn": (mamba2, convolved, mamba2, *((mlp,) if odd else ())),
        "mamba-in-llama": (grouped, mlp, attention, mlp),
        "mamba2-in-llama": (in_llama, mlp, attention, mlp),
        "granite-hybrid": (granite, mlp, unturned, mlp),
        "lfm2": (short, mlp, AttentionConfig(4, 2, 6, rotary, norm_eps=1e-3), mlp),
        "experts": (mamba2, (routed, mlp), unturned, plain),
        "parallel": ((falcon, attention), mlp, (attention, mamba1, mlp), squared),
    }
    multipliers = {
        "granite-hybrid": {"embedding_multiplier": 3.0, "residual_multiplier": 0.35, "logits_scaling": 0.7},
        "parallel": {"mixer_multipliers": ((0.7, 1.2), (1.1,), (0.9, 1.2, 0.8), (1.3,))},
    }
    return ModelConfig(d, 61, blocks[kind], tie_embeddings=False, **multipliers.get(kind, {}))


def as_dtype(weight: torch.Tensor, dtype: torch.dtype | str) -> torch.Tensor | BlockWeight:
    """In that dtype, or in the blocks of that format, if the rows are made of full ones."""
    if isinstance(dtype, torch.dtype):
        return weight.to(dtype)
    return quantized(weight, dtype) if can_quantize(weight.shape[1]) else weight


@functools.lru_cache(maxsize=2)  # of a target and a draft
def _pool(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A million normal numbers, and the state of the generator that drew them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1 << 20, generator=generator, dtype=torch.float32, device="cpu"), generator.get_state()


class RandomTensors:
    """Random weights by name, scaled so that activations and state keep a useful size at any depth."""

    def __init__(self, dtype: torch.dtype | str, seed: int, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.rest_dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
        # Values repeat within a large weight, memory does not: filling gigabytes with fresh numbers takes minutes.
        pool, state = _pool(seed)
        self.generator, self.pool = torch.Generator("cpu").set_state(state), pool.to(device)

    def has(self, name: str) -> bool:
        return False

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor | BlockWeight:
        scale = {"embedding": 1.0, "head": 0.3}.get(name, shape[1] ** -0.5)
        shape = shape if rows is None else (rows.stop - rows.start, shape[1])
        return as_dtype(self._normal(shape, scale), self.dtype)

    def experts(self, names: str | Sequence[str], *shape: int, rows: slice | None = None) -> ExpertWeight:
        N = shape[1] if rows is None else rows.stop - rows.start
        values = self._normal((shape[0], N, shape[2]), shape[2] ** -0.5)
        matrices = [as_dtype(matrix, self.dtype) for matrix in values]
        blocks = isinstance(matrices[0], BlockWeight)
        return ExpertWeight.of_blocks(matrices) if blocks else ExpertWeight(tuple(matrices))

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        if "conv1d" in name:
            return self._normal(shape, shape[-1] ** -0.5)
        if "router" in name:
            return self._normal(shape, shape[-1] ** -0.5)
        return (1 + self._normal(shape, 0.1)).to(self.rest_dtype)

    def float32(self, name: str, *shape: int) -> torch.Tensor:
        low, high = -0.2, 0.2
        if name.endswith("A_log"):
            return self._uniform(shape, 0.5, shape[1] if len(shape) == 2 else 16).log()
        if name.endswith("dt_bias") or name.endswith("dt_proj.bias"):
            low, high = -4.0, -1.0
        elif name.endswith("D"):
            low, high = 0.5, 1.5
        return self._uniform(shape, low, high)

    def _normal(self, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        offset = int(torch.randint(0, 1 << 16, (), generator=self.generator, device="cpu"))
        count = math.prod(shape)
        start = (len(self.pool) - offset) % len(self.pool)
        values = torch.cat([self.pool[start : start + count], self.pool[: min(count, start)]])[:count]
        values = (values * scale).to(self.rest_dtype)
        return values.repeat(-(-count // len(values)))[:count].view(shape)

    def _uniform(self, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return (values * (high - low) + low).to(self.device)


def random_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> MambaLM:
    """A model with random weights.

    With ``"q8_0"`` or ``"q4_0"`` matrices are in blocks, and the rest is float32: as ``load_model`` makes of a float32
    checkpoint.
    """
    blocks = tuple(
        (f"{i}.block_norm", *(f"{i}.{j}." for j in range(len(mixers)))) for i, mixers in enumerate(config.mixers)
    )
    names = Names(("embedding",), "final_norm", "head", blocks)
    device = torch.device(device)
    model = build(config, names, RandomTensors(dtype, seed, device), backends.resolve(backend, device.type))
    model.name = "random"
    return model


class TableModel:
    """A language model without a state: row t of ``table`` (V, V) holds the probabilities of the token after t.

    Samples can be checked exactly against it, and zeros in the table give distributions of any support.
    """

    eos_token_id = None
    device = torch.device("cpu")

    def __init__(self, table: torch.Tensor) -> None:
        self.vocab_size = len(table)
        self._logits = table.double().log().float()

    def new_cache(self, batch: int, slots: int) -> list:
        return []

    def prefill(self, tokens: list[int], cache: list, row: int) -> None: ...

    def verify(
        self,
        tokens: torch.Tensor,
        cache: list,
        start_slot: torch.Tensor,
        write_slot: int = 0,
        left_padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._logits[tokens]
