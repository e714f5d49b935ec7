"""The specification: that of ``ssd_verify``, for heads of one channel and an A for every state."""

import torch

from ..ssd_verify.reference import ssd_verify
from . import SelectiveScanVerifyArgs


def selective_scan_verify(args: SelectiveScanVerifyArgs) -> torch.Tensor:
    return ssd_verify(args.as_ssd())[..., 0]
