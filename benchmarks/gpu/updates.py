"""What others do for one token of a row: the steps of PyTorch's operations, and mamba_ssm's kernels where installed."""

import functools
import importlib
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from speculative_mamba.ops.commit_tokens import BatchState
from speculative_mamba.ops.sampling_params import SamplingParams


@functools.cache
def optional(module: str, name: str) -> Callable | None:
    """A function of a library that need not be installed; one that is there but broken is named once."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return None
    except (ImportError, AttributeError, OSError) as error:
        print(f"benchmarks.gpu: {module}.{name} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def conv_update(history: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """history (B, W, D), its last row the newest, is moved on by x (B, D)."""
    history.copy_(torch.cat([history[:, 1:], x[:, None].to(history.dtype)], 1))
    return F.silu((history * weight.t()).sum(1) + bias).to(x.dtype)


def scan_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    z: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mamba-1: state (B, D, N), x and dt (B, D), A (D, N), B and C (B, N).
    Mamba-2: state (B, H, P, N), x (B, H, P), dt (B, H, 1), A (H, 1, 1), B and C (B, 1, 1, N), D (H, 1).
    """
    step = F.softplus(dt.float() + dt_bias)[..., None]
    B, C = (part.float().view(len(x), *[1] * (state.ndim - 2), -1) for part in (B, C))
    state.copy_(state * torch.exp(step * A) + step * x.float()[..., None] * B)
    y = (state * C).sum(-1) + D * x
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def probs_of(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Filtered probabilities (..., V): only the k largest are ever sorted."""
    kept, ids = (logits / params.temperature).topk(params.top_k or logits.shape[-1], -1)
    kept = torch.softmax(kept, -1)
    kept = kept.masked_fill(kept.cumsum(-1) - kept >= params.top_p, 0)
    return torch.zeros_like(logits).scatter_(-1, ids, kept / kept.sum(-1, keepdim=True))


def draw(weights: torch.Tensor) -> torch.Tensor:
    """A token of each row of weights (..., V), by an exponential race: what multinomial does, without its checks."""
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def sample(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    return logits.argmax(-1) if params.greedy else draw(probs_of(logits, params))


def accept(
    logits: torch.Tensor, draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepted and next token of every row, by greedy choice or the test of Leviathan et al., without a host read."""
    if params.greedy:
        choices = logits.argmax(-1)
        accepted = (choices[:, :-1] == draft_tokens).int().cumprod(1).sum(1)
        return accepted, choices.gather(1, accepted[:, None])[:, 0]
    target = probs_of(logits, params)
    p, q = (rows.gather(2, draft_tokens[..., None])[..., 0] for rows in (target[:, :-1], draft_probs))
    accepted = (torch.rand_like(q) * q < p).int().cumprod(1).sum(1)
    at = accepted[:, None, None].expand(-1, 1, logits.shape[-1])
    of_draft = F.pad(draft_probs, (0, 0, 0, 1)).gather(1, at)  # nothing is taken after the last token
    return accepted, draw((target.gather(1, at) - of_draft).clamp_(min=0)[:, 0])


def commit(
    draft_tokens: torch.Tensor,
    accepted: torch.Tensor,
    next_token: torch.Tensor,
    is_stop: torch.Tensor,
    state: BatchState,
) -> torch.Tensor:
    """commit_tokens without a budget; leaves ``state`` alone."""
    at = torch.arange(draft_tokens.shape[1] + 1, device=draft_tokens.device)
    window = torch.where(at < accepted[:, None], F.pad(draft_tokens, (0, 1)), next_token[:, None])
    stops = is_stop.gather(1, window) & (at <= accepted[:, None])
    count = torch.where(stops.any(1), stops.int().argmax(1), accepted) + 1
    last = torch.cat([state.last, window], 1).gather(1, count[:, None] + at[:2])
    slots = torch.where(state.active & ~stops.any(1), count - 1, -1)
    return torch.cat([count[:, None], window, last, state.positions[:, None] + count[:, None], slots[:, None]], 1)
