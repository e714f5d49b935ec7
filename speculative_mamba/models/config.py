"""Sizes of a language model: what every block is, and what surrounds the blocks."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mamba1Config:
    """A Mamba-1 mixer. dt_rank is the rank of the dt projection; norm_eps: RMS norms of dt, B and C, whose weights are
    stored (Jamba) or one (Falcon-Mamba)."""

    d_inner: int
    dt_rank: int
    d_state: int = 16
    d_conv: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float | None = None
    weighted_norms: bool = False


@dataclass(frozen=True)
class GroupedMamba1Config:
    """A Mamba-1 mixer made from an attention layer (The Mamba in the Llama): z and C take the place of queries, x and B
    that of keys and values, d_xb channels of which serve d_inner in heads of d_state."""

    d_inner: int
    d_xb: int
    dt_rank: int
    d_state: int = 16
    d_conv: int = 4
    conv_bias: bool = True
    repeat_before_conv: bool = True


@dataclass(frozen=True)
class Mamba2Config:
    """A Mamba-2 mixer of n_heads heads of head_dim channels. x_heads heads of x, and groups of B and C, serve them all.

    norm: gated RMS norm in norm_groups parts; without it y is gated inside the scan. gate_first: what is gated is
    normed, or else what is normed is gated. repeat_before_conv: x and B are repeated for all heads first (The Mamba in
    the Llama), so that the convolution treats each copy by itself. in_multiplier: of the input; multipliers: of the
    projected z, x, B, C and dt (Falcon-H1). out_bias None: as bias.
    """

    n_heads: int
    head_dim: int
    d_state: int
    x_heads: int
    b_groups: int
    c_groups: int
    d_conv: int = 4
    conv_bias: bool = True
    bias: bool = False
    out_bias: bool | None = None
    norm: bool = True
    gate_first: bool = True
    norm_groups: int = 1
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, math.inf)
    D_has_head_dim: bool = False
    repeat_before_conv: bool = False
    in_multiplier: float = 1.0
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim


@dataclass(frozen=True)
class ShortConvConfig:
    """A gated convolution without a scan. bias: of both projections and of the convolution."""

    d_inner: int
    d_conv: int = 3
    bias: bool = False


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention. inv_freq: rotary frequencies, one for each rotated pair; scale None: head_dim ** -0.5;
    d_conv 0: no convolution over queries, keys and values; norm_eps: RMS norms of each head of queries and keys."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    inv_freq: tuple[float, ...] = ()
    scale: float | None = None
    bias: bool = False
    out_bias: bool = False
    d_conv: int = 0
    norm_eps: float | None = None


@dataclass(frozen=True)
class MlpConfig:
    """An MLP. activation: "silu" or "relu2", of gate_multiplier times the gate, or of all where it is not gated."""

    d_inner: int
    bias: bool = False
    activation: str = "silu"
    gated: bool = True
    gate_multiplier: float = 1.0


@dataclass(frozen=True)
class ExpertsConfig:
    """num_experts MLPs of d_inner, of which each token takes top_k. bias: added to scores to choose; score and the rest
    as in ``ops.select_experts``; activation and gated as in ``MlpConfig``."""

    num_experts: int
    top_k: int
    d_inner: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    score: str = "softmax"
    groups: int = 1
    top_k_groups: int = 1
    normalize: bool = True
    epsilon: float = 0.0
    scale: float = 1.0


MixerConfig = (
    Mamba1Config | GroupedMamba1Config | Mamba2Config | ShortConvConfig | AttentionConfig | MlpConfig | ExpertsConfig
)
BlockConfig = MixerConfig | tuple[MixerConfig, ...]  # several read the same normed input, and their outputs are summed


@dataclass(frozen=True)
class ModelConfig:
    """A language model of pre-norm residual blocks; an MLP is a block of its own.

    vocab_size: token ids are below it. padded_vocab_size: rows of the stored embedding and head, where there are more;
    they are never read. Embeddings and the outputs of mixers count as often as their multipliers say, an output as
    residual_multiplier and its own of mixer_multipliers, one for each mixer of each block; logits are divided by
    logits_scaling.
    """

    d_model: int
    vocab_size: int
    blocks: tuple[BlockConfig, ...]
    eps: float = 1e-5
    tie_embeddings: bool = True
    eos_token_id: int | tuple[int, ...] | None = None
    padded_vocab_size: int | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    mixer_multipliers: tuple[tuple[float, ...], ...] | None = None
    logits_scaling: float = 1.0

    @property
    def mixers(self) -> tuple[tuple[MixerConfig, ...], ...]:
        """Those of each block."""
        return tuple(block if isinstance(block, tuple) else (block,) for block in self.blocks)

    @property
    def multipliers(self) -> tuple[tuple[float, ...], ...]:
        """How often the output of each mixer of each block counts."""
        own = self.mixer_multipliers or tuple((1.0,) * len(mixers) for mixers in self.mixers)
        return tuple(tuple(self.residual_multiplier * multiplier for multiplier in block) for block in own)

    @property
    def stored_vocab_size(self) -> int:
        return self.padded_vocab_size or self.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return token_ids(self.eos_token_id)


def token_ids(ids: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """One, several or no ids as a tuple."""
    return () if ids is None else ids if isinstance(ids, tuple) else (ids,)


def mamba1_config(d_model: int, n_layer: int, vocab_size: int, **other: Any) -> ModelConfig:
    """A Mamba-1 model in the usual proportions: d_inner = 2 d_model, dt_rank = d_model / 16 rounded up."""
    of_model = {name: other.pop(name) for name in ("eps", "tie_embeddings", "eos_token_id") if name in other}
    block = Mamba1Config(**{"d_inner": 2 * d_model, "dt_rank": math.ceil(d_model / 16), **other})
    return ModelConfig(d_model, vocab_size, (block,) * n_layer, **of_model)
