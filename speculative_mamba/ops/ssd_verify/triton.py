"""The Mamba-2 recurrence in Triton."""

import torch

from ..triton_scan import scan
from . import SsdVerifyArgs


def ssd_verify(args: SsdVerifyArgs) -> torch.Tensor:
    return scan(args)
