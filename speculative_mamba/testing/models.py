"""Random models of any shape, and a model whose law is a table."""

import math

import torch

from ..layers.block import Block
from ..layers.mamba1 import Mamba1Mixer
from ..models.config import MambaConfig
from ..models.language_model import MambaLM
from ..ops import backend as backends
from ..ops.int8 import Int8Weight, quantised

# Published Mamba-1 shapes: (d_model, n_layer); vocabulary 50,280, d_state 16, d_conv 4.
SHAPES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}


def published_config(name: str) -> MambaConfig:
    d_model, n_layer = SHAPES[name]
    return MambaConfig.of_size(d_model, n_layer, 50280)


def tiny_config(**other: int) -> MambaConfig:
    return MambaConfig.of_size(**{"d_model": 24, "n_layer": 2, "vocab_size": 61, "d_state": 5, "dt_rank": 3, **other})


def as_dtype(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | Int8Weight:
    return quantised(weight) if dtype is torch.int8 else weight.to(dtype)


def random_model(
    config: MambaConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0, backend: str = "auto"
) -> MambaLM:
    """A model with random weights, scaled so that activations and state keep a useful size at any depth.

    With ``torch.int8`` the matrices are int8, and the rest is float32: as ``load_model`` makes of a float32 checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)
    c = config
    # Values repeat within a large weight, memory does not: filling gigabytes with fresh numbers takes minutes.
    pool = torch.randn(1 << 20, generator=generator)
    rest_dtype = torch.float32 if dtype is torch.int8 else dtype

    def normal(*shape: int, scale: float) -> torch.Tensor:
        offset = int(torch.randint(0, 1 << 16, (), generator=generator))
        count = math.prod(shape)
        values = (pool.roll(offset) * scale).to(rest_dtype)
        return values.repeat(-(-count // len(values)))[:count].view(shape)

    def matrix(*shape: int, scale: float) -> torch.Tensor | Int8Weight:
        return as_dtype(normal(*shape, scale=scale), dtype)

    def uniform(*shape: int, low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def block() -> Block:
        mixer = Mamba1Mixer(
            in_proj=matrix(2 * c.d_inner, c.d_model, scale=c.d_model**-0.5),
            conv_weight=normal(c.d_inner, c.d_conv, scale=c.d_conv**-0.5),
            conv_bias=uniform(c.d_inner, low=-0.2, high=0.2) if c.conv_bias else None,
            x_proj=matrix(c.dt_rank + 2 * c.d_state, c.d_inner, scale=c.d_inner**-0.5),
            dt_proj=matrix(c.d_inner, c.dt_rank, scale=c.dt_rank**-0.5),
            dt_bias=uniform(c.d_inner, low=-4.0, high=-1.0),
            A=-uniform(c.d_inner, c.d_state, low=0.5, high=c.d_state),
            D=uniform(c.d_inner, low=0.5, high=1.5),
            out_proj=matrix(c.d_model, c.d_inner, scale=c.d_inner**-0.5),
            backend=backend,
        )
        return Block((1 + normal(c.d_model, scale=0.1)).to(rest_dtype), mixer, c.eps)

    backend = backends.resolve(backend, "cpu")
    embedding = matrix(c.vocab_size, c.d_model, scale=1.0)
    return MambaLM(
        config=c,
        embedding=embedding,
        blocks=[block() for _ in range(c.n_layer)],
        norm_weight=(1 + normal(c.d_model, scale=0.1)).to(rest_dtype),
        head=embedding if c.tie_embeddings else matrix(c.vocab_size, c.d_model, scale=0.3),
        name="random",
        backend=backend,
    )


class TableModel:
    """A language model without a state: row t of ``table`` (V, V) is the law of the token after t.

    Laws can be checked exactly against it, and zeros in the table give laws of any support.
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
        null_columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._logits[tokens]
