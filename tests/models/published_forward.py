"""Forward passes over a whole text in float64, from the published definitions of layers that transformers lacks:
state-spaces' Mamba-2 and attention layers, and those of The Mamba in the Llama. They know tensors by their names."""

import math
from typing import Any

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


class Layer:
    """The tensors whose names begin with a prefix, in float64."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        self.tensors, self.prefix = tensors, prefix

    def get(self, name: str) -> torch.Tensor | None:
        value = self.tensors.get(self.prefix + name)
        return None if value is None else value.double()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.get(name + ".weight"), self.get(name + ".bias"))

    def conv(self, x: torch.Tensor) -> torch.Tensor:
        """Causal and depthwise, over a text (L, D)."""
        weight = self.get("conv1d.weight")
        padded = F.pad(x.T, (weight.shape[2] - 1, 0))[None]
        return F.conv1d(padded, weight, self.get("conv1d.bias"), groups=len(weight))[0].T


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


def heads_of(x: torch.Tensor, size: int, copies: int = 1) -> torch.Tensor:
    """(L, D) → (L, D / size · copies, size), every head so many times in a row."""
    return x.view(len(x), -1, size).repeat_interleave(copies, 1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotated: int, base: float, scale: float | None):
    """q (L, H, P), k and v (L, G, P); the first ``rotated`` dims are turned, first half against second half."""
    if rotated:
        frequencies = base ** (-torch.arange(0, rotated, 2).double() / rotated)
        turn = torch.polar(torch.ones(len(q), 1, rotated // 2, dtype=torch.float64),
                           torch.arange(len(q)).double()[:, None, None] * frequencies)  # fmt: skip
        half = rotated // 2

        def rotate(x: torch.Tensor) -> torch.Tensor:
            turned = torch.complex(x[..., :half].contiguous(), x[..., half:rotated].contiguous()) * turn
            return torch.cat([turned.real, turned.imag, x[..., rotated:]], -1)

        q, k = rotate(q), rotate(k)
    copies = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    y = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scale)
    return y.transpose(0, 1).flatten(1)


def ssd(x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor, layer: Layer) -> torch.Tensor:
    """x (L, H, P), dt (L, H), B and C (L, H, N)."""
    A, D = -layer.get("A_log").exp(), layer.get("D").view(x.shape[1], -1)
    state, y = torch.zeros(*x.shape[1:], B.shape[-1], dtype=torch.float64), []
    for t in range(len(x)):
        state = (dt[t] * A).exp()[:, None, None] * state + dt[t, :, None, None] * x[t, :, :, None] * B[t, :, None, :]
        y.append(torch.einsum("hpn,hn->hp", state, C[t]) + D * x[t])
    return torch.stack(y).flatten(1)


def gated(y: torch.Tensor, z: torch.Tensor, layer: Layer, groups: int) -> torch.Tensor:
    y, weight = y * F.silu(z), layer.get("norm.weight")
    if weight is None:
        return y
    return norm(y.view(len(y), groups, -1), weight.view(groups, -1)).flatten(1)


def state_spaces(config: dict[str, Any], tensors: Tensors, ids: list[int]) -> torch.Tensor:
    model, ssm, attn = Layer(tensors, "backbone."), config["ssm_cfg"], config["attn_cfg"]
    h = model.get("embedding.weight")[torch.tensor(ids)]
    for i in range(config["n_layer"]):
        block = Layer(tensors, f"backbone.layers.{i}.")
        mixer, x = Layer(tensors, f"backbone.layers.{i}.mixer."), norm(h, block.get("norm.weight"))
        h = h + (_mha(mixer, x, attn) if i in config["attn_layer_idx"] else _mamba2(mixer, x, ssm))
        if config["d_intermediate"]:
            y, gate = block.linear("mlp.fc1", norm(h, block.get("norm2.weight"))).chunk(2, -1)
            h = h + block.linear("mlp.fc2", y * F.silu(gate))
    return norm(h, model.get("norm_f.weight")) @ tensors["lm_head.weight"].double().T


def _mamba2(layer: Layer, x: torch.Tensor, ssm: dict[str, Any]) -> torch.Tensor:
    inner, groups, N = layer.get("out_proj.weight").shape[1], ssm.get("ngroups", 1), ssm["d_state"]
    heads = inner // ssm["headdim"]
    z, xBC, dt = layer.linear("in_proj", x).split([inner, inner + 2 * groups * N, heads], -1)
    x, B, C = F.silu(layer.conv(xBC)).split([inner, groups * N, groups * N], -1)
    dt = F.softplus(dt + layer.get("dt_bias")).clamp(*ssm.get("dt_limit", (0.0, math.inf)))
    B, C = (heads_of(part, N, heads // groups) for part in (B, C))
    y = ssd(heads_of(x, ssm["headdim"]), dt, B, C, layer)
    return layer.linear("out_proj", gated(y, z, layer, groups))


def _mha(layer: Layer, x: torch.Tensor, attn: dict[str, Any]) -> torch.Tensor:
    P, shared = attn["head_dim"], attn.get("num_heads_kv", attn["num_heads"])
    packed = layer.linear("in_proj", x)
    if attn.get("d_conv"):
        packed = layer.conv(packed)
    q, k, v = (heads_of(part, P) for part in packed.split([attn["num_heads"] * P, shared * P, shared * P], -1))
    base = attn.get("rotary_emb_base", 10000.0)
    y = attention(q, k, v, attn.get("rotary_emb_dim", 0), base, attn.get("softmax_scale"))
    return layer.linear("out_proj", y)


def hybrid_of_llama(base: dict[str, Any], mamba: dict[str, Any], tensors: Tensors, ids: list[int]) -> torch.Tensor:
    eps, ssm = base["rms_norm_eps"], mamba["ssm_cfg"]
    h = tensors["model.embed_tokens.weight"].double()[torch.tensor(ids)]
    for i in range(base["num_hidden_layers"]):
        p = f"model.layers.{i}."
        block, mixer = Layer(tensors, p), Layer(tensors, p + "mamba.")
        x = norm(h, block.get("input_layernorm.weight"), eps)
        if i in mamba["attn_layers"]:
            P = base["hidden_size"] // base["num_attention_heads"]
            q, k, v = (heads_of(block.linear(f"self_attn.{name}_proj", x), P) for name in "qkv")
            h = h + block.linear("self_attn.o_proj", attention(q, k, v, P, base["rope_theta"], None))
        else:
            kind = _mamba2_in_llama if "ngroups" in ssm else _mamba1_in_llama
            h = h + kind(mixer, x, ssm, mamba["d_inner"] // mamba["d_xb"])
        x = norm(h, block.get("post_attention_layernorm.weight"), eps)
        h = h + block.linear("mlp.down_proj", F.silu(block.linear("mlp.gate_proj", x)) * block.linear("mlp.up_proj", x))
    head = tensors["model.embed_tokens.weight" if base["tie_word_embeddings"] else "lm_head.weight"]
    return norm(h, tensors["model.norm.weight"], eps) @ head.double().T


def _mamba1_in_llama(layer: Layer, h: torch.Tensor, ssm: dict[str, Any], copies: int) -> torch.Tensor:
    N = ssm["d_state"]
    z, x, B, C, dt = (layer.linear(name, h) for name in ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down"))
    if ssm.get("repeat_kv_before_conv", True):
        x = F.silu(layer.conv(heads_of(x, N, copies).flatten(1)))
    else:
        x = heads_of(F.silu(layer.conv(x)), N, copies).flatten(1)
    dt = F.softplus(layer.linear("dt_proj", dt) + layer.get("dt_proj.bias"))  # twice, as the authors' layer has it
    A, D = -layer.get("A_log").exp(), layer.get("D")
    B, C = heads_of(B, N, copies), heads_of(C, N)
    B, C = (part.repeat_interleave(N, 1) for part in (B, C))  # a head's N channels share its B and C
    state, y = torch.zeros_like(A), []
    for t in range(len(x)):
        state = (dt[t, :, None] * A).exp() * state + (dt[t] * x[t])[:, None] * B[t]
        y.append((state * C[t]).sum(-1) + D * x[t])
    return layer.linear("out_proj", torch.stack(y) * F.silu(z))


def _mamba2_in_llama(layer: Layer, h: torch.Tensor, ssm: dict[str, Any], copies: int) -> torch.Tensor:
    heads, P = ssm["ngroups"], ssm["d_state"]
    inner, shared = heads * P, heads * P // copies
    z, x, B, C, dt = layer.linear("in_proj", h).split([inner, shared, shared, inner, heads], -1)
    if ssm.get("repeat_kv_before_conv", False):
        x, B = (heads_of(part, P, copies).flatten(1) for part in (x, B))
    sizes = [x.shape[1], B.shape[1], inner]
    x, B, C = F.silu(layer.conv(torch.cat([x, B, C], -1))).split(sizes, -1)
    x, B, C = (heads_of(part, P, inner // part.shape[1]) for part in (x, B, C))
    y = ssd(x, F.softplus(dt + layer.get("dt_bias")), B, C, layer)
    return layer.linear("out_proj", gated(y, z, layer, heads))
