"""The reference computes activations of 16 bits in float32."""

from typing import TypeVar

import torch

Args = TypeVar("Args", bound=tuple)


def is_narrow(activations: torch.Tensor) -> bool:
    return activations.dtype in (torch.bfloat16, torch.float16)


def widened(args: Args, *names: str) -> Args:
    """The arguments with those of these names, unless None, in float32."""
    wide = {name: getattr(args, name).float() for name in names if getattr(args, name) is not None}
    return args._replace(**wide)
