"""Which ops on which shapes, dtypes and sizes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from speculative_mamba.models.config import ExpertsConfig, ModelConfig
from speculative_mamba.models.sources import QUANTIZED
from speculative_mamba.ops.block_weight import can_quantize
from speculative_mamba.testing.models import published_config

from .attention import Attention
from .choices import FILTERS, Accept, Commit, Sample
from .recurrences import MODES, Conv, Scan, Ssd
from .row_ops import Embedding, ExpertLinear, Linear, MlpActivation, Norm, SelectExperts
from .work import ACTIVATIONS, Work

VOCABULARY = 50288
MODELS = ("2.8b", "130m", "370m", "790m", "1.4b")
MAMBA2_MODELS = ("mamba2-2.7b", "mamba2-780m")
MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj", "head")
TOKENS = (5, 1, 2, 4, 8, 16)
BATCHES = (1, 4, 16, 64)
ROWS = (1, 5, 2, 4, 8, 16, 32, 64)
STATES = (torch.float32, torch.bfloat16)
HEADS, KV_HEADS, HEAD_DIM, MLP = 32, 8, 128, 14336  # of Llama 3 8B
CONTEXTS = (512, 4096)


@dataclass(frozen=True)
class Case:
    """One row of the table. ``distance``: in how many factors it differs from the op's first case."""

    op: str
    shape: str
    dtype: torch.dtype | str
    distance: int
    sizes: dict[str, int]  # rows, or tokens and batch
    work: Callable[[torch.device], Work]  # a fresh set of buffers
    mode: str | None = None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        return ", ".join(filter(None, (f"{self.op} {self.shape}", self.dtype_name, self.mode, sizes)))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def cases() -> list[Case]:
    """Those nearest to their op's first case come first, so that a run that is cut short has measured what matters."""
    return sorted(itertools.chain(*(of_op() for of_op in OPS.values())), key=lambda case: case.distance)


def _product(*factors: tuple) -> Iterator[tuple[int, tuple]]:
    """Every combination of values, and how many differ from the first value of their factor."""
    for values in itertools.product(*factors):
        yield sum(value != factor[0] for value, factor in zip(values, factors, strict=True)), values


def _published(models: tuple[str, ...]) -> dict[str, ModelConfig]:
    return {model: published_config(model) for model in models}


def _conv() -> Iterator[Case]:
    configs = _published(MODELS)
    for distance, (model, tokens, batch) in _product(MODELS, TOKENS, BATCHES):
        D, W = configs[model].blocks[0].d_inner, configs[model].blocks[0].d_conv
        make = partial(Conv, D, W, batch, tokens)
        yield Case("causal_conv1d_verify", f"{D}x{W}", ACTIVATIONS, distance, _window(tokens, batch), make)


def _scan() -> Iterator[Case]:
    configs = _published(MODELS)
    for distance, (model, tokens, batch, dtype, mode) in _product(MODELS, TOKENS, BATCHES, STATES, MODES):
        D, N = configs[model].blocks[0].d_inner, configs[model].blocks[0].d_state
        make = partial(Scan, D, N, batch, tokens, dtype, mode)
        yield Case("selective_scan_verify", f"{D}x{N}", dtype, distance, _window(tokens, batch), make, mode)


def _ssd() -> Iterator[Case]:
    configs = _published(MAMBA2_MODELS)
    for distance, (model, tokens, batch, dtype, mode) in _product(MAMBA2_MODELS, TOKENS, BATCHES, STATES, MODES):
        mixer = configs[model].blocks[0]
        H, P, N = mixer.n_heads, mixer.head_dim, mixer.d_state
        make = partial(Ssd, H, P, N, batch, tokens, dtype, mode)
        yield Case("ssd_verify", f"{H}x{P}x{N}", dtype, distance, _window(tokens, batch), make, mode)


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The weights (N, K) of a Mamba-1 layer, and the head."""
    m = config.blocks[0]
    return {
        "in_proj": (2 * m.d_inner, config.d_model),
        "x_proj": (m.dt_rank + 2 * m.d_state, m.d_inner),
        "dt_proj": (m.d_inner, m.dt_rank),
        "out_proj": (config.d_model, m.d_inner),
        "head": (VOCABULARY, config.d_model),
    }


def _linear() -> Iterator[Case]:
    weights = {model: matrices(config) for model, config in _published(MODELS).items()}
    for distance, (model, name, rows, dtype) in _product(MODELS, MATRICES, ROWS, (torch.bfloat16, *QUANTIZED)):
        N, K = weights[model][name]
        if dtype in QUANTIZED and not can_quantize(K):
            continue
        make = partial(Linear, K, N, rows, dtype, torch.float32 if name == "head" else ACTIVATIONS)
        yield Case("skinny_linear", f"{N}x{K}", dtype, distance, {"rows": rows}, make)


def _norm() -> Iterator[Case]:
    configs = _published(MODELS)
    for distance, (model, rows) in _product(MODELS, ROWS):
        d = configs[model].d_model
        yield Case("rms_norm", f"{d}", ACTIVATIONS, distance, {"rows": rows}, partial(Norm, d, rows))


def _embedding() -> Iterator[Case]:
    configs = _published(MODELS)
    for distance, (model, rows) in _product(MODELS, ROWS):
        d = configs[model].d_model
        make = partial(Embedding, VOCABULARY, d, rows)
        yield Case("embed_tokens", f"{VOCABULARY}x{d}", ACTIVATIONS, distance, {"rows": rows}, make)


def _silu() -> Iterator[Case]:
    for distance, (rows,) in _product(ROWS):
        yield Case("mlp_activation", f"{MLP}", ACTIVATIONS, distance, {"rows": rows}, partial(MlpActivation, MLP, rows))


def _experts_of_tiny() -> tuple[ExpertsConfig, int]:
    """Those of Granite 4.0 H Tiny, and the width of its residual stream."""
    config = published_config("granite-4.0-h-tiny")
    return next(mixer for mixer in config.mixers[1] if isinstance(mixer, ExpertsConfig)), config.d_model


def _select_experts() -> Iterator[Case]:
    c, _ = _experts_of_tiny()
    for distance, (rows,) in _product(ROWS):
        make = partial(SelectExperts, c.num_experts, c.top_k, rows)
        yield Case("select_experts", f"{c.top_k}/{c.num_experts}", torch.float32, distance, {"rows": rows}, make)


def _expert_linear() -> Iterator[Case]:
    c, d_model = _experts_of_tiny()
    for distance, ((N, K), rows) in _product(((c.d_inner, d_model), (d_model, c.d_inner)), ROWS):
        make, shape = partial(ExpertLinear, K, N, c.num_experts, c.top_k, rows), f"{c.top_k}/{c.num_experts}x{N}x{K}"
        yield Case("expert_linear", shape, ACTIVATIONS, distance, {"rows": rows}, make)


def _attention() -> Iterator[Case]:
    heads = HEADS, KV_HEADS, HEAD_DIM
    for distance, (context, tokens, batch) in _product(CONTEXTS, TOKENS, BATCHES):
        make, shape = partial(Attention, *heads, context, batch, tokens), f"{HEADS}/{KV_HEADS}x{HEAD_DIM}@{context}"
        yield Case("attention_verify", shape, ACTIVATIONS, distance, _window(tokens, batch), make)


def _sample() -> Iterator[Case]:
    for distance, (name, batch) in _product(tuple(FILTERS), BATCHES):
        make = partial(Sample, VOCABULARY, FILTERS[name], batch)
        yield Case("sample_tokens", f"{VOCABULARY}", torch.float32, distance, {"rows": batch}, make, name)


def _accept() -> Iterator[Case]:
    for distance, (name, tokens, batch) in _product(tuple(FILTERS), TOKENS, BATCHES):
        make = partial(Accept, VOCABULARY, FILTERS[name], batch, tokens)
        yield Case("speculative_accept", f"{VOCABULARY}", torch.float32, distance, _window(tokens, batch), make, name)


def _commit() -> Iterator[Case]:
    for distance, (tokens, batch) in _product(TOKENS, BATCHES):
        make = partial(Commit, VOCABULARY, batch, tokens)
        yield Case("commit_tokens", f"{VOCABULARY}", torch.int64, distance, _window(tokens, batch), make)


def _window(tokens: int, batch: int) -> dict[str, int]:
    return {"tokens": tokens, "batch": batch}


OPS: dict[str, Callable[[], Iterator[Case]]] = {
    "causal_conv1d_verify": _conv,
    "selective_scan_verify": _scan,
    "ssd_verify": _ssd,
    "skinny_linear": _linear,
    "select_experts": _select_experts,
    "expert_linear": _expert_linear,
    "rms_norm": _norm,
    "mlp_activation": _silu,
    "embed_tokens": _embedding,
    "attention_verify": _attention,
    "sample_tokens": _sample,
    "speculative_accept": _accept,
    "commit_tokens": _commit,
}
