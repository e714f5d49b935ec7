"""The same weights as files for three engines: a Hugging Face checkpoint, and GGUF made from it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import speculative_mamba as sm
from speculative_mamba.models.files import read_json
from speculative_mamba.models.formats import parse_config
from speculative_mamba.models.weights import read_tensors
from speculative_mamba.ops.threads import num_threads


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


def gguf_file(checkpoint: Path, kind: str) -> Path:
    """A file for llama.cpp beside the checkpoint's folder, written when it is first asked for.

    kind: "f32", "bf16", "q8_0" or "q4_0"; all but the first are made from it by llama.cpp's own quantizer, which leaves
    what it always leaves in f32 (norms, biases, convolutions, A and D).
    """
    import llama_cpp

    path = checkpoint.with_name(f"{kind}.gguf")
    if path.exists():
        return path
    if kind == "f32":
        _write_gguf(checkpoint, path)
        return path
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings.nthread = num_threads()
    source = gguf_file(checkpoint, "f32")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), settings) != 0:
        raise RuntimeError(f"llama.cpp cannot make {path.name} from {source.name}")
    return path


def _write_gguf(checkpoint: Path, path: Path) -> None:
    """One tensor is widened to f32 at a time. There is no vocabulary: the file states its size, tokens go in as ids."""
    import gguf
    import numpy as np

    c, _ = parse_config(read_json(checkpoint / "config.json"))
    mixer = c.blocks[0]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MAMBA])
    writer.add_context_length(2**20)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(c.blocks))
    writer.add_ssm_conv_kernel(mixer.d_conv)
    writer.add_ssm_inner_size(mixer.d_inner)
    writer.add_ssm_state_size(mixer.d_state)
    writer.add_ssm_time_step_rank(mixer.dt_rank)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c.vocab_size)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, len(c.blocks))
    tensors = {name: stored.tensor for name, stored in read_tensors(checkpoint).items()}
    for name, tensor in tensors.items():
        shape = (tensor.shape[0], tensor.shape[-1]) if tensor.ndim == 3 else tensor.shape  # conv1d has an axis of one
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor_info(known, shape, np.dtype(np.float32), 4 * tensor.numel())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        wide = tensor.float()
        writer.write_tensor_data((-wide.exp() if name.endswith(".A_log") else wide).numpy())
    writer.close()
