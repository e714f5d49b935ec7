"""What this installation can do."""

import platform
from importlib import metadata
from pathlib import Path

import torch

import speculative_mamba

from .ops import backend as backends
from .ops.threads import num_threads


def describe() -> str:
    """Versions, backends with the reason each is on or off, instruction sets and CUDA architectures, one a line."""
    lines = [
        f"speculative-mamba {speculative_mamba.__version__} in {Path(speculative_mamba.__file__).parent}",
        f"python            {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]
    for package in ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy"):
        lines.append(f"{package:17} {metadata.version(package)}")
    lines.append(f"threads           {num_threads()}")
    for name, (devices, probe) in backends.BACKENDS.items():
        ok, reason = probe()
        lines.append(f"backend {name:9} {'on ' if ok else 'off'}  on {', '.join(devices)}: {reason}")
    module, _ = backends.extension()
    if module is not None:
        lines.append(f"instruction sets  {', '.join(module.available_isas())} (in use: {module.isa()})")
        lines.append(f"AMX               {module.obstacle_to_amx() or 'permitted'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"CUDA devices      {', '.join(devices) or 'none'}")
    return "\n".join(lines)
