"""Tiny random checkpoints in both public formats, written by or with the help of transformers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import random_hugging_face_model


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    folder: Path
    oracle: Any  # transformers' model, float32

    def change_config(self, **changes: Any) -> None:
        path = self.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_state_spaces(folder: Path, model: Any, **config: Any) -> None:
    c = model.config
    tensors = {name.replace("embeddings.", "embedding."): t.clone() for name, t in model.state_dict().items()}
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    ssm = {"d_state": c.state_size, "dt_rank": c.time_step_rank, "d_conv": c.conv_kernel, "bias": c.use_bias}
    settings = {
        "d_model": c.hidden_size, "n_layer": c.num_hidden_layers, "vocab_size": c.vocab_size, "ssm_cfg": ssm,
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
        "tie_embeddings": c.tie_word_embeddings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | config))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """checkpoint(format, **config): format is "safetensors", "sharded", "bin" or "state-spaces"."""

    def write(layout: str = "safetensors", state_spaces_config: dict | None = None, **config: Any) -> Checkpoint:
        model = random_hugging_face_model(**config)
        folder = tmp_path / layout
        folder.mkdir()
        if layout == "state-spaces":
            write_state_spaces(folder, model, **(state_spaces_config or {}))
        elif layout == "bin":
            model.config.save_pretrained(folder)
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        else:
            model.save_pretrained(folder, max_shard_size="12KB" if layout == "sharded" else "1GB")
            assert (len(list(folder.glob("*.safetensors"))) > 1) == (layout == "sharded")
        return Checkpoint(folder, model)

    return write
