"""Tokenizers of every kind, and a checkpoint that writes any text."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors


def byte_fallback_tokenizer(words: Sequence[str] = (), bos: bool = True) -> Tokenizer:
    """Llama's kind: ``<unk> <s> </s>``, the 256 byte tokens ``<0x00>`` …, then words with ▁ for a space.

    A word is read as one token where it is all of a text.
    """
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", ignore_merges=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level_tokenizer(specials: Sequence[str] = ()) -> Tokenizer:
    """GPT-2's kind without merges: one token per byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={name: token for token, name in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def word_piece_tokenizer() -> Tokenizer:
    """BERT's kind, with a few words."""
    names = ["[UNK]", "hello", "##ing", "world", ".", "'", "##s", "\ufffd"]
    tokenizer = Tokenizer(models.WordPiece(vocab={name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    return tokenizer


def write_chain(folder: Path, tokenizer: Tokenizer, chain: Sequence[str | int], eos: int | None = None) -> Path:
    """Writes a Mamba checkpoint whose greedy text is ``chain``, tokens by id or name: each follows the one before it.

    The mixers add nothing to the embeddings, which are unit vectors, and the head maps each to its successor.
    """
    size = tokenizer.get_vocab_size()
    ids = [token if isinstance(token, int) else tokenizer.token_to_id(token) for token in chain]
    head = torch.zeros(size, size)
    for token, successor in itertools.pairwise(ids):
        head[successor, token] = 20
    shapes = {
        "layers.0.mixer.in_proj.weight": (4 * size, size), "layers.0.mixer.conv1d.weight": (2 * size, 1, 4),
        "layers.0.mixer.conv1d.bias": (2 * size,), "layers.0.mixer.x_proj.weight": (3, 2 * size),
        "layers.0.mixer.dt_proj.weight": (2 * size, 1), "layers.0.mixer.dt_proj.bias": (2 * size,),
        "layers.0.mixer.A_log": (2 * size, 1), "layers.0.mixer.D": (2 * size,),
        "layers.0.mixer.out_proj.weight": (size, 2 * size),
    }  # fmt: skip
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors |= {name: torch.ones(size) for name in ("layers.0.norm.weight", "norm_f.weight")}
    tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {"backbone.embeddings.weight": torch.eye(size), "lm_head.weight": head}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": size, "hidden_size": size,
        "num_hidden_layers": 1, "state_size": 1, "conv_kernel": 4, "expand": 2, "intermediate_size": 2 * size,
        "time_step_rank": 1, "use_conv_bias": True, "tie_word_embeddings": False, "eos_token_id": eos,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
