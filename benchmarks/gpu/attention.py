"""attention_verify over a cache in bfloat16, without rotary embedding."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from speculative_mamba.ops import attention_verify
from speculative_mamba.testing.tolerance import assert_bitwise_equal

from .work import WindowWork, activations, assert_near, nbytes, outer_rows


class Attention(WindowWork):
    """The window's start slot, one behind its own, is never written, so that every call sees ``context`` entries."""

    launches = 3

    def __init__(
        self, heads: int, kv_heads: int, dims: int, context: int, batch: int, tokens: int, device: torch.device
    ) -> None:
        self.tokens, self.context = tokens, context
        self.q = activations(device, batch, tokens, heads, dims)
        self.k, self.v = (activations(device, batch, tokens, kv_heads, dims) for _ in range(2))
        self.keys, self.values = (activations(device, batch, kv_heads, context + tokens, dims) for _ in range(2))
        self.lengths = torch.full((batch, tokens + 1), context, dtype=torch.int32, device=device)
        self.slots = [torch.full((batch,), slot, dtype=torch.int32, device=device) for slot in range(tokens + 1)]
        self.mask = torch.ones(tokens, context + tokens, dtype=torch.bool, device=device).tril(context)
        self.moved = 2 * self.q.nbytes + nbytes(self.k, self.v, self.keys, self.values)

    def run(self, backend: str) -> torch.Tensor:
        cache = self.keys, self.values, self.lengths
        return attention_verify(self.q, self.k, self.v, *cache, self.slots[-1], backend=backend)

    def one_by_one(self, backend: str) -> list[torch.Tensor]:
        tokens = zip(*(part.split(1, 1) for part in (self.q, self.k, self.v)), strict=True)
        cache = self.keys, self.values, self.lengths
        return [
            attention_verify(*token, *cache, self.slots[t - 1], t, backend=backend) for t, token in enumerate(tokens)
        ]

    def check(self, backend: str) -> None:
        rows = outer_rows(len(self.q))
        window = (part[rows] for part in (self.q, self.k, self.v))
        cache = (part[rows] for part in (self.keys, self.values, self.lengths))
        expected = attention_verify(*window, *cache, self.slots[-1][rows], backend="reference")
        y = self.run(backend)
        assert_near(y[rows], expected, "y")
        assert_bitwise_equal(y, torch.cat(self.one_by_one(backend), 1), "y, against one token at a time")

    def baselines(self) -> dict[str, Callable[[], object]]:
        q, k, v = (part.transpose(1, 2) for part in (self.q, self.k, self.v))
        end = self.context + self.tokens
        grouped = q.shape[1] != k.shape[1]

        def attend() -> torch.Tensor:
            for entries, new in ((self.keys, k), (self.values, v)):
                entries[:, :, self.context : end] = new
            return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.mask, enable_gqa=grouped)

        return {"torch": attend}
