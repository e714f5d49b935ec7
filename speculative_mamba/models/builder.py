"""From named tensors to the blocks of a model: every shape is checked against the config, dtypes are converted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch

from ..layers.attention import Attention
from ..layers.block import Block, Mixer
from ..layers.experts import Experts
from ..layers.mamba1 import Mamba1Mixer
from ..layers.mamba1_grouped import GroupedMamba1Mixer
from ..layers.mamba2 import Mamba2Mixer
from ..layers.mlp import Mlp
from ..layers.short_conv import ShortConv
from ..ops.block_weight import BlockWeight
from ..ops.expert_weight import ExpertWeight
from .config import (
    AttentionConfig,
    ExpertsConfig,
    GroupedMamba1Config,
    Mamba1Config,
    Mamba2Config,
    MlpConfig,
    ModelConfig,
    ShortConvConfig,
)
from .formats import Names
from .language_model import MambaLM

Weight = torch.Tensor | BlockWeight


class Source(Protocol):
    """Gives tensors by name, on ``device`` and in the dtype in which they are used.

    Raises:
        ValueError: there is none of that name and shape.
    """

    device: torch.device

    def has(self, name: str) -> bool: ...
    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are stored with the same bits."""

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> Weight:
        """A matrix that multiplies or is looked up; it may be in blocks. rows: only those of the named tensor."""

    def experts(self, names: str | Sequence[str], *shape: int, rows: slice | None = None) -> ExpertWeight:
        """Matrices (E, N, K) of one tensor, or of one (N, K) each. rows: only those of each."""

    def weight(self, name: str, *shape: int) -> torch.Tensor: ...
    def float32(self, name: str, *shape: int) -> torch.Tensor: ...


def build(config: ModelConfig, names: Names, source: Source, backend: str) -> MambaLM:
    """The model of a config whose tensors come from ``source``."""
    embedding_name = next(filter(source.has, names.embedding), names.embedding[0])
    table, rows = (config.stored_vocab_size, config.d_model), slice(0, config.vocab_size)
    embedding = source.matrix(embedding_name, *table, rows=rows)
    # A head of its own is used wherever there is one, as transformers does, whatever the config says.
    tied = config.tie_embeddings and (not source.has(names.head) or source.equal(names.head, embedding_name))
    builder = _Builder(config.d_model, names.renamed, source, backend)
    return MambaLM(
        config=config,
        embedding=embedding,
        blocks=[
            Block(
                norm_weight=source.weight(norm, config.d_model),
                mixers=tuple(map(builder.mixer, prefixes, mixers)),
                eps=config.eps,
                multipliers=multipliers,
                backend=backend,
            )
            for (norm, *prefixes), mixers, multipliers in zip(
                names.blocks, config.mixers, config.multipliers, strict=True
            )
        ],
        norm_weight=source.weight(names.norm, config.d_model),
        head=embedding if tied else source.matrix(names.head, *table, rows=rows),
        backend=backend,
    )


@dataclass
class _Builder:
    d_model: int
    renamed: Mapping[str, str]
    source: Source
    backend: str

    def mixer(self, prefix: str, config: object) -> Mixer:
        builders: dict[type, Callable[[str, object], Mixer]] = {
            Mamba1Config: self.mamba1,
            GroupedMamba1Config: self.grouped_mamba1,
            Mamba2Config: self.mamba2,
            ShortConvConfig: self.short_conv,
            AttentionConfig: self.attention,
            MlpConfig: self.mlp,
            ExpertsConfig: self.experts,
        }
        return builders[type(config)](prefix, config)

    def mamba1(self, p: str, c: Mamba1Config) -> Mamba1Mixer:
        s, named = self.source, partial(self._named, p)
        return Mamba1Mixer(
            in_proj=s.matrix(named("in_proj.weight"), 2 * c.d_inner, self.d_model),
            in_bias=self._bias(c.bias, named("in_proj.bias"), 2 * c.d_inner),
            conv_weight=s.weight(named("conv1d.weight"), c.d_inner, 1, c.d_conv)[:, 0],
            conv_bias=self._bias(c.conv_bias, named("conv1d.bias"), c.d_inner),
            x_proj=s.matrix(named("x_proj.weight"), c.dt_rank + 2 * c.d_state, c.d_inner),
            dt_proj=s.matrix(named("dt_proj.weight"), c.d_inner, c.dt_rank),
            dt_bias=s.float32(named("dt_proj.bias"), c.d_inner),
            A=self._decay(p, c.d_inner, c.d_state),
            D=s.float32(named("D"), c.d_inner),
            out_proj=s.matrix(named("out_proj.weight"), self.d_model, c.d_inner),
            out_bias=self._bias(c.bias, named("out_proj.bias"), self.d_model),
            backend=self.backend,
            **self._mamba1_norms(p, c),
        )

    def _mamba1_norms(self, p: str, c: Mamba1Config) -> dict[str, Any]:
        if c.norm_eps is None:
            return {}
        sizes = {"dt_layernorm": c.dt_rank, "b_layernorm": c.d_state, "c_layernorm": c.d_state}
        if c.weighted_norms:
            norms = tuple(self.source.weight(self._named(p, f"{name}.weight"), size) for name, size in sizes.items())
        else:
            norms = tuple(torch.ones(size, dtype=torch.float32, device=self.source.device) for size in sizes.values())
        return {"norms": norms, "norm_eps": c.norm_eps}

    def grouped_mamba1(self, p: str, c: GroupedMamba1Config) -> GroupedMamba1Mixer:
        s, d = self.source, self.d_model
        sizes = {"z": c.d_inner, "x": c.d_xb, "B": c.d_xb, "C": c.d_inner, "dt": c.dt_rank}
        if s.has(p + "in_proj.weight"):
            total, projections, first = sum(sizes.values()), {}, 0
            for part, size in sizes.items():
                rows = slice(first, first + size)
                projections[part] = s.matrix(p + "in_proj.weight", total, d, rows=rows)
                first += size
        else:
            names = {"z": "in_proj_z", "x": "in_proj_x", "B": "B_proj", "C": "C_proj", "dt": "dt_proj_down"}
            projections = {part: s.matrix(f"{p}{names[part]}.weight", size, d) for part, size in sizes.items()}
        convolved = c.d_inner if c.repeat_before_conv else c.d_xb
        conv_weight = s.weight(p + "conv1d.weight", convolved, 1, c.d_conv)[:, 0]
        conv_bias = self._bias(c.conv_bias, p + "conv1d.bias", convolved)
        if not c.repeat_before_conv:  # convolving and then repeating is repeating the weights as well
            copies = c.d_inner // c.d_xb
            conv_weight = _repeated(conv_weight, copies, c.d_state)
            conv_bias = None if conv_bias is None else _repeated(conv_bias, copies, c.d_state)
        return GroupedMamba1Mixer(
            z_proj=projections["z"],
            x_proj=projections["x"],
            B_proj=projections["B"],
            C_proj=projections["C"],
            dt_down=projections["dt"],
            dt_proj=s.matrix(p + "dt_proj.weight", c.d_inner, c.dt_rank),
            conv_weight=conv_weight,
            conv_bias=conv_bias,
            dt_bias=s.float32(p + "dt_proj.bias", c.d_inner),
            A=-torch.exp(s.float32(p + "A_log", c.d_inner, c.d_state)),
            D=s.float32(p + "D", c.d_inner),
            out_proj=s.matrix(p + "out_proj.weight", d, c.d_inner),
            backend=self.backend,
        )

    def mamba2(self, p: str, c: Mamba2Config) -> Mamba2Mixer:
        s, named, heads = self.source, partial(self._named, p), (c.x_heads, c.b_groups, c.c_groups)
        conv_heads = (c.n_heads, c.n_heads) if c.repeat_before_conv else heads[:2]
        channels = conv_heads[0] * c.head_dim, conv_heads[1] * c.d_state, c.c_groups * c.d_state
        convolved, multipliers = sum(channels), c.multipliers[1:4]
        conv_weight = s.weight(named("conv1d.weight"), convolved, 1, c.d_conv)[:, 0]
        if multipliers != (1.0, 1.0, 1.0):  # in float32, since a multiplier is no power of two
            parts = zip(multipliers, conv_weight.float().split(channels), strict=True)
            conv_weight = torch.cat([multiplier * part for multiplier, part in parts])
        D = s.float32(named("D"), c.d_inner if c.D_has_head_dim else c.n_heads)
        return Mamba2Mixer(
            **self._mamba2_projections(p, c),
            conv_weight=conv_weight,
            conv_bias=self._bias(c.conv_bias, named("conv1d.bias"), convolved),
            A=self._decay(p, c.n_heads),
            D=D.view(c.n_heads, -1) if c.D_has_head_dim else D,
            dt_bias=s.float32(named("dt_bias"), c.n_heads),
            norm_weight=s.weight(named("norm.weight"), c.d_inner) if c.norm else None,
            out_proj=s.matrix(named("out_proj.weight"), self.d_model, c.d_inner),
            out_bias=self._bias(c.bias if c.out_bias is None else c.out_bias, named("out_proj.bias"), self.d_model),
            gate_first=c.gate_first,
            head_dim=c.head_dim,
            state_size=c.d_state,
            heads=heads,
            conv_heads=conv_heads,
            norm_groups=c.norm_groups,
            norm_eps=c.norm_eps,
            dt_limit=c.dt_limit,
            backend=self.backend,
        )

    def _mamba2_projections(self, p: str, c: Mamba2Config) -> dict[str, Any]:
        """One, or where z and dt have multipliers of their own that of z, of x, B and C, and of dt."""
        name, convolved = (
            self._named(p, "in_proj.weight"),
            c.x_heads * c.head_dim + (c.b_groups + c.c_groups) * c.d_state,
        )
        sizes, multipliers = (c.d_inner, convolved, c.n_heads), (c.multipliers[0], 1.0, c.multipliers[4])
        shape = sum(sizes), self.d_model
        bias = self._bias(c.bias, self._named(p, "in_proj.bias"), shape[0])
        if multipliers == (1.0, 1.0, 1.0):
            projections, biases, multipliers = (self.source.matrix(name, *shape),), (bias,), (1.0,)
        else:
            rows = [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
            projections = tuple(self.source.matrix(name, *shape, rows=part) for part in rows)
            parts = (None,) * 3 if bias is None else bias.split(sizes)
            biases = tuple(map(_times, multipliers, parts))
        multipliers = tuple(c.in_multiplier * multiplier for multiplier in multipliers)
        return {"projections": projections, "biases": biases, "multipliers": multipliers}

    def short_conv(self, p: str, c: ShortConvConfig) -> ShortConv:
        s, named = self.source, partial(self._named, p)
        return ShortConv(
            in_proj=s.matrix(named("in_proj.weight"), 3 * c.d_inner, self.d_model),
            in_bias=self._bias(c.bias, named("in_proj.bias"), 3 * c.d_inner),
            conv_weight=s.weight(named("conv1d.weight"), c.d_inner, 1, c.d_conv)[:, 0],
            conv_bias=self._bias(c.bias, named("conv1d.bias"), c.d_inner),
            out_proj=s.matrix(named("out_proj.weight"), self.d_model, c.d_inner),
            out_bias=self._bias(c.bias, named("out_proj.bias"), self.d_model),
            backend=self.backend,
        )

    def attention(self, p: str, c: AttentionConfig) -> Attention:
        s, inner, shared = self.source, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        packed = inner + 2 * shared
        # Queries, keys and values are one matrix in some formats, and where they are convolved, and three in others.
        names = (p, p.replace("self_attn", "mha"))
        merged = next((name for name in names if c.d_conv or s.has(name + "in_proj.weight")), None)
        if merged is not None:
            parts, out = {merged + "in_proj": packed}, merged + "out_proj"
        else:
            sizes = {"q_proj": inner, "k_proj": shared, "v_proj": shared}
            parts = {self._named(p, name): size for name, size in sizes.items()}
            out = self._named(p, "o_proj")
        return Attention(
            projections=tuple(s.matrix(f"{name}.weight", size, self.d_model) for name, size in parts.items()),
            biases=tuple(self._bias(c.bias, f"{name}.bias", size) for name, size in parts.items()),
            out_proj=s.matrix(f"{out}.weight", self.d_model, inner),
            out_bias=self._bias(c.out_bias, f"{out}.bias", self.d_model),
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            inv_freq=torch.tensor(c.inv_freq, dtype=torch.float32, device=s.device) if c.inv_freq else None,
            scale=c.scale,
            conv_weight=s.weight(p + "conv1d.weight", packed, 1, c.d_conv)[:, 0] if c.d_conv else None,
            conv_bias=s.float32(p + "conv1d.bias", packed) if c.d_conv else None,
            q_norm=self._head_norm(p, "q_norm", c, c.n_heads),
            k_norm=self._head_norm(p, "k_norm", c, c.n_kv_heads),
            norm_eps=c.norm_eps,
            backend=self.backend,
        )

    def _head_norm(self, p: str, name: str, c: AttentionConfig, heads: int) -> torch.Tensor | None:
        """One weight serves all heads."""
        if c.norm_eps is None:
            return None
        return self.source.weight(self._named(p, name) + ".weight", c.head_dim).repeat(heads)

    def mlp(self, p: str, c: MlpConfig) -> Mlp:
        s, d = self.source, self.d_model
        gate, up, down = (self._named(p, name) for name in ("gate_proj", "up_proj", "down_proj"))
        merged = next((name for name in ("gate_up_proj", "up_gate_proj") if name in self.renamed), None)
        if not c.gated:
            first, second = None, s.matrix(f"{up}.weight", c.d_inner, d)
        elif merged is None:
            first, second = (s.matrix(f"{name}.weight", c.d_inner, d) for name in (gate, up))
        else:
            both, rows = (self._named(p, merged) + ".weight", 2 * c.d_inner, d), slice(0, c.d_inner)
            first, second = s.matrix(*both, rows=rows), s.matrix(*both, rows=slice(c.d_inner, 2 * c.d_inner))
        return Mlp(
            gate_proj=second if merged == "up_gate_proj" else first,
            up_proj=first if merged == "up_gate_proj" else second,
            down_proj=s.matrix(f"{down}.weight", d, c.d_inner),
            gate_bias=_times(c.gate_multiplier, self._bias(c.bias and c.gated, f"{gate}.bias", c.d_inner)),
            up_bias=self._bias(c.bias, f"{up}.bias", c.d_inner),
            down_bias=self._bias(c.bias, f"{down}.bias", d),
            activation=c.activation,
            gate_multiplier=c.gate_multiplier,
            backend=self.backend,
        )

    def _decay(self, p: str, *shape: int) -> torch.Tensor:
        """A, stored as the logarithm of its absolute value, or in GGUF as it is."""
        stored = self._named(p, "A")
        if self.source.has(stored):
            return self.source.float32(stored, *shape)
        return -torch.exp(self.source.float32(self._named(p, "A_log"), *shape))

    def experts(self, p: str, c: ExpertsConfig) -> Experts:
        """Their matrices are one tensor (E, N, K), gate and up in turn or apart, or one each."""
        s, d, count = self.source, self.d_model, c.num_experts
        inner, outer = (count, c.d_inner, d), (count, d, c.d_inner)
        if "gate_up_proj" in self.renamed:
            both, rows = (self._named(p, "gate_up_proj.weight"), count, 2 * c.d_inner, d), slice(0, c.d_inner)
            gate, up = s.experts(*both, rows=rows), s.experts(*both, rows=slice(c.d_inner, 2 * c.d_inner))
            down = s.experts(self._named(p, "down_proj.weight"), *outer)
        else:
            gate = s.experts(self._expert_names(p, "gate", count), *inner) if c.gated else None
            up = s.experts(self._expert_names(p, "up", count), *inner)
            down = s.experts(self._expert_names(p, "down", count), *outer)
        return Experts(
            router=s.weight(self._named(p, "router") + ".weight", count, d),
            router_bias=self._bias(c.bias, self._named(p, "router_bias"), count),
            gate_proj=gate,
            up_proj=up,
            down_proj=down,
            top_k=c.top_k,
            score=c.score,
            groups=c.groups,
            top_k_groups=c.top_k_groups,
            normalize=c.normalize,
            epsilon=c.epsilon,
            scale=c.scale,
            activation=c.activation,
            backend=self.backend,
        )

    def _expert_names(self, p: str, part: str, count: int) -> str | list[str]:
        """Of the one tensor that has all gates, or of a tensor for each."""
        if f"{part}_exps" in self.renamed:
            return self._named(p, f"{part}_exps.weight")
        return [self._named(f"{p}experts.{e}.", f"{part}_proj.weight") for e in range(count)]

    def _named(self, p: str, name: str) -> str:
        stem, dot, suffix = name.partition(".")
        return p + self.renamed.get(stem, stem) + dot + suffix

    def _bias(self, present: bool, name: str, size: int) -> torch.Tensor | None:
        return self.source.float32(name, size) if present else None


def _times(multiplier: float, bias: torch.Tensor | None) -> torch.Tensor | None:
    return bias if bias is None or multiplier == 1 else multiplier * bias


def _repeated(tensor: torch.Tensor, copies: int, block: int) -> torch.Tensor:
    """Blocks of the first dimension, each so many times in a row."""
    return tensor.unflatten(0, (-1, 1, block)).expand(-1, copies, -1, *tensor.shape[1:]).flatten(0, 2).contiguous()
