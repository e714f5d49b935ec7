"""The same weights as files for three engines: a Hugging Face checkpoint, and GGUF made from it."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import speculative_mamba as sm
from speculative_mamba.models.builder import build
from speculative_mamba.models.formats import parse_config
from speculative_mamba.ops.expert_weight import ExpertWeight
from speculative_mamba.ops.threads import num_threads
from speculative_mamba.testing.models import RandomTensors


def write_checkpoint(model: sm.MambaLM, folder: Path) -> None:
    """Hugging Face format, each tensor in the dtype that the model holds it in."""
    c, mixer = model.config, model.config.blocks[0]
    settings = {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": c.d_model,
        "num_hidden_layers": len(c.blocks), "vocab_size": c.vocab_size, "intermediate_size": mixer.d_inner,
        "time_step_rank": mixer.dt_rank, "state_size": mixer.d_state, "conv_kernel": mixer.d_conv,
        "layer_norm_epsilon": c.eps, "tie_word_embeddings": c.tie_embeddings, "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias, "eos_token_id": c.eos_token_id,
    }  # fmt: skip
    tensors = {"backbone.embeddings.weight": model.embedding, "backbone.norm_f.weight": model.norm_weight}
    if not c.tie_embeddings:
        tensors["lm_head.weight"] = model.head
    for index, block in enumerate(model.blocks):
        layer, m = f"backbone.layers.{index}.", block.mixers[0]
        tensors[layer + "norm.weight"] = block.norm_weight
        mixer = {
            "in_proj.weight": m.in_proj, "conv1d.weight": m.conv_weight[:, None].contiguous(),
            "conv1d.bias": m.conv_bias, "x_proj.weight": m.x_proj, "dt_proj.weight": m.dt_proj,
            "dt_proj.bias": m.dt_bias, "A_log": torch.log(-m.A), "D": m.D, "out_proj.weight": m.out_proj,
        }  # fmt: skip
        tensors |= {f"{layer}mixer.{name}": tensor for name, tensor in mixer.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))


class _Written(RandomTensors):
    """Random weights that are kept by the names under which a checkpoint has them."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16, 0, torch.device("cpu"))
        self.tensors: dict[str, torch.Tensor] = {}

    def has(self, name: str) -> bool:
        return name in self.tensors

    def _keep(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in self.tensors:
            self.tensors[name] = make().contiguous()
        return self.tensors[name]

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor:
        return self._keep(name, partial(super().matrix, name, *shape))[rows or slice(None)]

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        return self._keep(name, partial(super().weight, name, *shape))

    def float32(self, name: str, *shape: int) -> torch.Tensor:
        return self._keep(name, partial(super().float32, name, *shape))

    def experts(self, names: str | Sequence[str], *shape: int, rows: slice | None = None) -> ExpertWeight:
        if isinstance(names, str):
            matrices = self._keep(names, partial(self._normal, shape, shape[2] ** -0.5))
        else:
            matrices = [self._keep(name, partial(self._normal, shape[1:], shape[2] ** -0.5)) for name in names]
        return ExpertWeight(tuple(matrix[rows or slice(None)] for matrix in matrices))


def write_random_checkpoint(settings: dict[str, Any], folder: Path) -> None:
    """Random bf16 weights of a config.json, in Hugging Face format."""
    source = _Written()
    build(*parse_config(settings), source, "reference")
    folder.mkdir()
    save_file(source.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))


def gguf_file(checkpoint: Path, kind: str) -> Path:
    """A file for llama.cpp beside the checkpoint's folder, written when it is first asked for.

    kind: "f32", or what llama.cpp's own quantizer makes from it: "bf16", "q8_0", "q4_0", "q4_K_M". That one leaves what
    it always leaves in f32 (norms, biases, convolutions, A and D). There is no vocabulary: the file states its size,
    tokens go in as ids.

    Raises:
        RuntimeError: llama.cpp cannot make it.
    """
    import llama_cpp

    from speculative_mamba.testing.gguf_files import write_gguf

    path = checkpoint.with_name(f"{kind}.gguf")
    if path.exists():
        return path
    if kind == "f32":
        return write_gguf(checkpoint, path)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings.nthread = num_threads()
    source = gguf_file(checkpoint, "f32")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings) != 0:
        raise RuntimeError(f"llama.cpp cannot make {path.name} from {source.name}")
    return path
