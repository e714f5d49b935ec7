"""Small sound checkpoints of every format, which tests/models/fuzz.py damages."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

import speculative_mamba.models as models
from speculative_mamba.models.builder import build
from speculative_mamba.models.formats import parse_config

LLAMA = {
    "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": False, "eos_token_id": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip
MAMBA2_IN_LLAMA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
MAMBA = {
    "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2, "expand": 2,
    "conv_kernel": 4, "eos_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
SCALED_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
STATE_SPACES = {"d_model": 16, "n_layer": 2, "vocab_size": 250, "pad_vocab_size_multiple": 8, "rms_norm": True}
MAMBA_IN_LLAMA = {
    "d_model": 16, "n_layer": 2, "intermediate_size": 24, "d_xb": 8, "attn_layers": [1], "rms_norm_eps": 1e-5,
}  # fmt: skip

# name -> config.json, and mamba_config.json or None
CONFIGS = {
    "mamba": (MAMBA | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, None),
    "falcon-mamba": (MAMBA | {"model_type": "falcon_mamba"}, None),
    "mamba2": (
        MAMBA | {"model_type": "mamba2", "num_heads": 4, "head_dim": 8, "n_groups": 2, "time_step_limit": [0.0, 9.0]},
        None,
    ),
    "llama": (LLAMA | {"model_type": "llama", "rope_parameters": SCALED_ROPE}, None),
    "granite": (LLAMA | {"model_type": "granite", "attention_multiplier": 0.5, "logits_scaling": 2.0}, None),
    "granite-hybrid": (
        LLAMA
        | MAMBA2_IN_LLAMA
        | {"model_type": "granitemoehybrid", "num_local_experts": 0, "shared_intermediate_size": 24}
        | {"layer_types": ["mamba", "attention"]},
        None,
    ),
    "lfm2": (
        LLAMA | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        None,
    ),
    "nemotron-h": (
        LLAMA
        | {"model_type": "nemotron_h", "hybrid_override_pattern": "M-*M", "num_hidden_layers": 4, "head_dim": 8}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2},
        None,
    ),
    "jamba": (
        LLAMA
        | {"model_type": "jamba", "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"mamba_d_state": 4, "mamba_dt_rank": 2},
        None,
    ),
    "bamba": (LLAMA | MAMBA2_IN_LLAMA | {"model_type": "bamba", "attn_layer_indices": [1]}, None),
    "falcon-h1": (
        LLAMA
        | MAMBA2_IN_LLAMA
        | {"model_type": "falcon_h1", "mamba_d_ssm": 32, "mlp_multipliers": [0.5, 2.0], "lm_head_multiplier": 0.5}
        | {"ssm_multipliers": [0.5, 2.0, 1.0, 1.5, 1.0]},
        None,
    ),
    "state-spaces": (STATE_SPACES | {"ssm_cfg": {"d_state": 4, "dt_rank": 2}}, None),
    "mamba2attn": (
        STATE_SPACES
        | {"ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8}, "attn_layer_idx": [1], "d_intermediate": 8}
        | {"attn_cfg": {"causal": True, "num_heads": 2, "d_conv": 4, "head_dim": 8, "rotary_emb_dim": 4}},
        None,
    ),
    "mamba-in-llama": (
        LLAMA | {"model_type": "mistral"},
        MAMBA_IN_LLAMA | {"ssm_cfg": {"d_state": 4, "expand": 1}},
    ),
    "mamba2-in-llama": (
        LLAMA | {"model_type": "llama"},
        MAMBA_IN_LLAMA | {"ssm_cfg": {"d_state": 8, "expand": 1, "ngroups": 2}},
    ),
}
GENERATION = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "eos_token_id": [2, 0], "num_beams": 1}
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ eos_token }}{% endfor %}"
TOKENIZER_FILES = {
    "tokenizer_config.json": {
        "chat_template": [{"name": "default", "template": TEMPLATE}],
        "eos_token": {"content": "</s>", "special": True},
        "extra_special_tokens": {"image_token": "<i>"},
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
}


class AskedFor:
    """A source of tensors that says which a config calls for: zeros of these shapes."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def has(self, name: str) -> bool:
        return False

    def equal(self, first: str, second: str) -> bool:
        return True

    def weight(self, name: str, *shape: int) -> torch.Tensor:
        return self.tensors.setdefault(name, torch.zeros(shape))

    float32 = weight

    def matrix(self, name: str, *shape: int, rows: slice | None = None) -> torch.Tensor:
        return self.weight(name, *shape)[rows or slice(None)]


def write_corpus(root: Path) -> dict[Path, Path]:
    """Every file that may be damaged, and the checkpoint it belongs to, as load_model takes it."""
    for name, (config, mamba_config) in CONFIGS.items():
        folder = root / name
        folder.mkdir()
        asked = AskedFor()
        build(*parse_config(config, mamba_config), asked, "reference")
        save_file(asked.tensors, folder / "model.safetensors", {"format": "pt"})
        documents = {"config.json": config, "mamba_config.json": mamba_config, "generation_config.json": GENERATION}
        write_documents(folder, {file: document for file, document in documents.items() if document is not None})
    bytes_alone = Tokenizer.from_file(str(Path(models.__file__).parent / "builtin" / "draft" / "tokenizer.json"))
    tokenizers = {"mamba": bytes_alone, "state-spaces": bytes_alone, "mamba2attn": bytes_alone, "llama": unigram()}
    for name, tokenizer in tokenizers.items():
        tokenizer.save(str(root / name / "tokenizer.json"))
        write_documents(root / name, TOKENIZER_FILES)
    _with_shards(shutil.copytree(root / "bamba", root / "shards"))
    return {file: file.parent for file in sorted(root.glob("*/*"))}


def write_documents(folder: Path, documents: dict[str, object]) -> None:
    for file, document in documents.items():
        (folder / file).write_text(json.dumps(document))


def unigram() -> Tokenizer:
    """A tokenizer with every stage that there is."""
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(97, 123)), "\u2581", "\u2581a", "te"]
    tokenizer = Tokenizer(Unigram([(token, -float(at)) for at, token in enumerate(tokens)], 0, False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\t", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(pad_id=2, pad_token="</s>")
    return tokenizer


def _with_shards(folder: Path) -> None:
    """An index, and shards that hold one layer each."""
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for part in ("layers.0", "layers.1", ""):
        mine = {name: tensor for name, tensor in tensors.items() if part in name and name not in weight_map}
        weight_map |= dict.fromkeys(mine, f"model-{part}.safetensors")
        save_file(mine, folder / f"model-{part}.safetensors", {"format": "pt"})
    write_documents(folder, {"model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}})
