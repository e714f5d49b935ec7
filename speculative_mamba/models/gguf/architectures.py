"""What a model is by the metadata of its GGUF file, for the architectures that llama.cpp and this package share.

llama.cpp's conversion leaves its traces: A is stored instead of its logarithm, multipliers of Falcon-H1 are part of the
weights, and rows of queries and keys are interleaved in some families.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...ops.select_experts import MAX_EXPERTS
from ..config import (
    AttentionConfig,
    BlockConfig,
    ExpertsConfig,
    Mamba1Config,
    Mamba2Config,
    MlpConfig,
    ModelConfig,
    ShortConvConfig,
)
from ..formats import Names
from ..formats.fields import (
    MAX_HEAD_SIZE,
    MAX_LAYERS,
    conv_width,
    divides,
    epsilon,
    flag,
    number,
    refuse,
    refuse_other,
    required,
    rotary_frequencies,
    shown,
)
from .header import Value

ROPE_FACTORS = "rope_freqs.weight"
EXPERTS = "_exps.weight"  # with which names of tensors (E, N, K) end
_RENAMED = {
    "in_proj": "ssm_in", "conv1d": "ssm_conv1d", "x_proj": "ssm_x", "dt_proj": "ssm_dt", "dt_layernorm": "ssm_dt_norm",
    "b_layernorm": "ssm_b_norm", "c_layernorm": "ssm_c_norm", "A": "ssm_a", "D": "ssm_d", "norm": "ssm_norm",
    "out_proj": "ssm_out", "dt_bias": "ssm_dt.bias", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "gate_exps": "ffn_gate_exps", "up_exps": "ffn_up_exps",
    "down_exps": "ffn_down_exps", "router": "ffn_gate_inp", "router_bias": "exp_probs_b.bias",
}  # fmt: skip
_SHARED = {f"{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}  # an MLP beside experts
_SHORT_CONV = {"in_proj": "shortconv.in_proj", "conv1d": "shortconv.conv", "out_proj": "shortconv.out_proj"}


@dataclass(frozen=True)
class Description:
    """names: of tensors in the file. interleaved: of matrices of queries and keys whose rows are not in the order of
    the heads' halves, how many heads they have."""

    config: ModelConfig
    names: Names
    interleaved: dict[str, int]


@dataclass(frozen=True)
class _Metadata:
    """What a file says of its architecture. stored: the names of its tensors. rope_factors: what rotary frequencies are
    divided by, or nothing."""

    values: Mapping[str, Value]
    architecture: str
    stored: frozenset[str]
    rope_factors: Sequence[float]

    def read(self, reader: Callable[..., Any], key: str, *default: Any, **options: Any) -> Any:
        """A field with a function of ``formats.fields``."""
        return reader(self.values, f"{self.architecture}.{key}", *default, **options)

    def has(self, layer: int, name: str) -> bool:
        return f"blk.{layer}.{name}" in self.stored

    @property
    def d_model(self) -> int:
        return self.read(required, "embedding_length")

    @property
    def layers(self) -> int:
        return self.read(required, "block_count", limit=MAX_LAYERS)

    @property
    def eps(self) -> float:
        """Nemotron-H's has two names, and a file need not have both."""
        keys = [f"{self.architecture}.attention.{name}" for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon")]
        key = keys[self.architecture in _NEMOTRON_H and keys[0] not in self.values]
        return epsilon(self.values, key, None)

    def of_layer(self, key: str, layer: int, default: int | None = None) -> int:
        """A number for all layers, or one for each, of which some may be 0."""
        key = f"{self.architecture}.{key}"
        value = self.values.get(key, default)
        if isinstance(value, list):
            if len(value) != self.layers:
                raise ValueError(f"config.json gives {len(value)} {key}, but {self.layers} layers")
            value = value[layer]
        return required({key: value}, key, lo=0)

    def attends(self, layer: int) -> bool:
        return self.of_layer("attention.head_count_kv", layer) > 0

    def mamba1(self, layer: int) -> Mamba1Config:
        weighted = self.has(layer, "ssm_dt_norm.weight")
        normed = weighted or self.read(flag, "ssm.dt_b_c_rms", False)
        return Mamba1Config(
            d_inner=self.read(required, "ssm.inner_size"),
            dt_rank=self.read(required, "ssm.time_step_rank"),
            d_state=self.read(required, "ssm.state_size", limit=MAX_HEAD_SIZE),
            d_conv=self.read(conv_width, "ssm.conv_kernel"),
            conv_bias=self.has(layer, "ssm_conv1d.bias"),
            bias=self.has(layer, "ssm_in.bias"),
            norm_eps=self.eps if normed else None,
            weighted_norms=weighted,
        )

    def mamba2(self, layer: int) -> Mamba2Config:
        """The rank of dt is the number of heads."""
        heads, groups = self.read(required, "ssm.time_step_rank"), self.read(required, "ssm.group_count")
        inner = self.read(required, "ssm.inner_size")
        divides(heads, inner, f"{self.architecture}.ssm.time_step_rank")
        return Mamba2Config(
            n_heads=heads,
            head_dim=inner // heads,
            d_state=self.read(required, "ssm.state_size", limit=MAX_HEAD_SIZE),
            x_heads=heads,
            b_groups=divides(groups, heads, f"{self.architecture}.ssm.group_count"),
            c_groups=groups,
            d_conv=self.read(conv_width, "ssm.conv_kernel"),
            conv_bias=self.has(layer, "ssm_conv1d.bias"),
            bias=self.has(layer, "ssm_in.bias"),
            out_bias=self.has(layer, "ssm_out.bias"),
            norm=self.has(layer, "ssm_norm.weight"),
            norm_groups=groups,
            norm_eps=self.eps,
        )

    def short_conv(self, layer: int) -> ShortConvConfig:
        bias = self.has(layer, "shortconv.in_proj.bias")
        return ShortConvConfig(self.d_model, self.read(conv_width, "shortconv.l_cache"), bias)

    def attention(self, layer: int) -> AttentionConfig:
        heads = self.of_layer("attention.head_count", layer)
        shared = self.of_layer("attention.head_count_kv", layer, heads)
        if not heads or not shared or heads % shared:
            key = f"{self.architecture}.attention.head_count"
            raise ValueError(f"config.json gives {key} = {heads} and {key}_kv = {shared} for layer {layer}")
        head_dim = self._head_dim(heads)
        return AttentionConfig(
            n_heads=heads,
            n_kv_heads=shared,
            head_dim=head_dim,
            inv_freq=self._rotary(head_dim) if self._rotates else (),
            scale=self._scale,
            bias=self.has(layer, "attn_q.bias"),
            out_bias=self.has(layer, "attn_output.bias"),
            norm_eps=self.eps if self.has(layer, "attn_q_norm.weight") else None,
        )

    def mlp(self, layer: int) -> MlpConfig:
        gated = self.has(layer, "ffn_gate.weight")
        return MlpConfig(
            d_inner=self.of_layer("feed_forward_length", layer),
            bias=self.has(layer, "ffn_down.bias"),
            activation=self._activation,
            gated=gated or self.architecture not in _NEMOTRON_H,
        )

    def feed_forward(self, layer: int) -> BlockConfig:
        """An MLP, or experts, or both in the order in which the family's other format has them."""
        if not self.has(layer, "ffn_gate_inp.weight"):
            return self.mlp(layer)
        experts, gated = self.experts(layer), self.architecture not in _NEMOTRON_H
        if not self.has(layer, "ffn_up_shexp.weight"):
            return experts
        size = self.read(required, "expert_shared_feed_forward_length")
        mlp = MlpConfig(size, activation=self._activation, gated=gated)
        return (mlp, experts) if gated else (experts, mlp)

    def experts(self, layer: int) -> ExpertsConfig:
        """What of the choice is not in the file is the family's."""
        sigmoid = self.architecture in _SIGMOID
        for key, values in {
            "expert_gating_func": (2 if sigmoid else 1,), "moe_latent_size": (0,), "nextn_predict_layers": (0,),
            **({} if sigmoid else {"expert_weights_scale": (0.0, 1.0)}),
        }.items():  # fmt: skip
            self.read(refuse_other, key, *values)
        count = self.read(required, "expert_count", limit=MAX_EXPERTS)
        groups = self.read(required, "expert_group_count", 1)
        size = count // divides(groups, count, f"{self.architecture}.expert_group_count")
        if groups > 1 and size < 2:
            key = f"{self.architecture}.expert_group_count"
            refuse(key, groups, f"at least two of the {count} experts in a group")
        top_k_groups = self.read(required, "expert_group_used_count", 1, limit=groups)
        own = f"{self.architecture}.expert_feed_forward_length" in self.values
        return ExpertsConfig(
            num_experts=count,
            top_k=self.read(required, "expert_used_count", limit=size * top_k_groups),
            d_inner=self.of_layer("expert_feed_forward_length" if own else "feed_forward_length", layer),
            activation=self._activation,
            gated=self.architecture not in _NEMOTRON_H,
            bias=self.has(layer, "exp_probs_b.bias"),
            score="sigmoid" if sigmoid else "softmax",
            groups=groups,
            top_k_groups=top_k_groups,
            normalize=self.read(flag, "expert_weights_norm", self.architecture not in ("jamba", *_NEMOTRON_H)),
            epsilon={"lfm2moe": 1e-6, "nemotron_h_moe": 1e-20}.get(self.architecture, 0.0),
            scale=self.read(number, "expert_weights_scale", 1.0) if sigmoid else 1.0,
        )

    @property
    def _activation(self) -> str:
        return "relu2" if self.architecture in _NEMOTRON_H else "silu"

    def _head_dim(self, heads: int) -> int:
        stated = f"{self.architecture}.attention.key_length"
        if stated not in self.values:
            divides(heads, self.d_model, f"{self.architecture}.attention.head_count")
        head_dim = required(self.values, stated, self.d_model // heads, limit=MAX_HEAD_SIZE)
        refuse_other(self.values, f"{self.architecture}.attention.value_length", head_dim)
        return head_dim

    @property
    def _rotates(self) -> bool:
        """Granite's files say it in a field that is there for another purpose."""
        if self.architecture in ("jamba", *_NEMOTRON_H):
            return False
        return not self.architecture.startswith("granite") or self.read(flag, "rope.scaling.finetuned", True)

    @property
    def _scale(self) -> float | None:
        stated = self.architecture.startswith("granite") and f"{self.architecture}.attention.scale" in self.values
        return self.read(number, "attention.scale") if stated else None

    def _rotary(self, head_dim: int) -> tuple[float, ...]:
        """Frequencies. Of a part of a head only in Bamba, a hybrid of Granite's architecture."""
        dims = self.read(required, "rope.dimension_count", head_dim)
        if dims % 2 or dims > head_dim or (dims != head_dim and self.architecture != "granitehybrid"):
            refuse(f"{self.architecture}.rope.dimension_count", dims, f"the size of a head, {head_dim},")
        frequencies = rotary_frequencies(self.read(number, "rope.freq_base", 10000.0), dims)
        kind = self.values.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind == "linear":
            return tuple((frequencies / self.read(number, "rope.scaling.factor")).tolist())
        if kind != "none":
            key = f"{self.architecture}.rope.scaling.type"
            raise ValueError(f"config.json has {key} = {shown(kind)}; only 'none' and 'linear' are supported")
        if not self.rope_factors:
            return tuple(frequencies.tolist())
        if len(self.rope_factors) != len(frequencies) or not all(factor > 0 for factor in self.rope_factors):
            raise ValueError(
                f"config.json has a {ROPE_FACTORS} that does not fit: {dims // 2} positive numbers are needed"
            )
        return tuple((frequencies / torch.tensor(self.rope_factors)).tolist())


def _hybrid(recurrent: Callable[[_Metadata, int], BlockConfig]) -> Callable[[_Metadata, int], tuple[BlockConfig, ...]]:
    return lambda m, i: (m.attention(i) if m.attends(i) else recurrent(m, i), m.feed_forward(i))


def _nemotron_h(m: _Metadata, layer: int) -> tuple[BlockConfig, ...]:
    if m.attends(layer):
        return (m.attention(layer),)
    return (m.feed_forward(layer) if m.of_layer("feed_forward_length", layer) else m.mamba2(layer),)


# The blocks of a layer.
_LAYERS: dict[str, Callable[[_Metadata, int], tuple[BlockConfig, ...]]] = {
    "mamba": lambda m, i: (m.mamba1(i),),
    "mamba2": lambda m, i: (m.mamba2(i),),
    "llama": lambda m, i: (m.attention(i), m.mlp(i)),
    "granite": lambda m, i: (m.attention(i), m.mlp(i)),
    "granitemoe": lambda m, i: (m.attention(i), m.feed_forward(i)),
    "granitehybrid": _hybrid(_Metadata.mamba2),
    "lfm2": _hybrid(_Metadata.short_conv),
    "lfm2moe": _hybrid(_Metadata.short_conv),
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "jamba": _hybrid(_Metadata.mamba1),
    "falcon-h1": lambda m, i: ((m.mamba2(i), m.attention(i)), m.mlp(i)),
}
_NEMOTRON_H = ("nemotron_h", "nemotron_h_moe")
_WITH_EXPERTS = ("granitemoe", "granitehybrid", "lfm2moe", "nemotron_h_moe", "jamba")
_SIGMOID = ("lfm2moe", "nemotron_h_moe")  # how their experts are chosen
_INTERLEAVED = ("llama", "granite", "granitemoe", "granitehybrid", *_NEMOTRON_H)
_NORMS = (("attn_norm.weight",), ("ffn_norm.weight", "ffn_norm"))


def describe(
    values: Mapping[str, Value],
    stored: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float],
    eos_token_ids: tuple[int, ...],
) -> Description:
    """stored: the shape of every tensor by name.

    Raises:
        ValueError: the architecture is not supported, or metadata is missing, of the wrong type or makes no sense.
    """
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _LAYERS:
        raise ValueError(
            f"general.architecture {shown(architecture)} is not supported; supported: {', '.join(_LAYERS)}"
        )
    experts = next((name for name in stored if "_exps" in name), None)
    if experts is not None and architecture not in _WITH_EXPERTS:
        raise ValueError(
            f"a mixture of experts (it has {experts}), which is not supported for {architecture}; supported for: "
            f"{', '.join(_WITH_EXPERTS)}"
        )
    m = _Metadata(values, architecture, frozenset(stored), rope_factors)
    layers = [_LAYERS[architecture](m, i) for i in range(m.layers)]
    names, interleaved = [], {}
    for i, blocks in enumerate(layers):
        for block, norms in zip(blocks, _NORMS, strict=False):
            mixers = block if isinstance(block, tuple) else (block,)
            norm = next((norm for norm in norms if m.has(i, norm)), norms[0])
            names.append((f"blk.{i}.{norm}", *(f"blk.{i}." for _ in mixers)))
            for mixer in mixers:
                if isinstance(mixer, AttentionConfig) and architecture in _INTERLEAVED:
                    interleaved |= {f"blk.{i}.attn_q": mixer.n_heads, f"blk.{i}.attn_k": mixer.n_kv_heads}
    multiplier = partial(m.read, number) if architecture.startswith("granite") else lambda key, default: default
    config = ModelConfig(
        d_model=m.d_model,
        vocab_size=stored.get("token_embd.weight", (0,))[0] or m.read(required, "vocab_size"),
        blocks=sum(layers, ()),
        eps=m.eps,
        tie_embeddings="output.weight" not in stored,
        eos_token_id=eos_token_ids or None,
        embedding_multiplier=multiplier("embedding_scale", 1.0),
        residual_multiplier=multiplier("residual_scale", 1.0),
        logits_scaling=multiplier("logit_scale", 1.0),
    )
    norm = next(
        (name for name in ("output_norm.weight", "token_embd_norm.weight") if name in stored), "output_norm.weight"
    )
    renamed = _RENAMED | (_SHORT_CONV if architecture.startswith("lfm2") else {})
    if any("_shexp." in name for name in stored):
        renamed |= _SHARED
    return Description(config, Names(("token_embd.weight",), norm, "output.weight", tuple(names), renamed), interleaved)
