"""What this installation can do."""

import platform
from importlib import metadata
from pathlib import Path

import torch

import speculative_mamba

from .ops import backend as backends


def print_info() -> None:
    """Prints versions, backends with the reason each is on or off, instruction sets and CUDA architectures."""
    print(f"speculative-mamba {speculative_mamba.__version__} in {Path(speculative_mamba.__file__).parent}")
    print(f"python            {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy"):
        print(f"{package:17} {metadata.version(package)}")
    print(f"threads           {torch.get_num_threads()}")
    for name, (devices, probe) in backends.BACKENDS.items():
        ok, reason = probe()
        print(f"backend {name:9} {'on ' if ok else 'off'}  on {', '.join(devices)}: {reason}")
    module, _ = backends.extension()
    if module is not None:
        print(f"instruction sets  {', '.join(module.available_isas())} (in use: {module.isa()})")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices      {', '.join(devices) or 'none'}")
