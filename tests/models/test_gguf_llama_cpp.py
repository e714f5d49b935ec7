"""The same greedy text as llama.cpp from the same file, where llama-cpp-python is installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gguf import IDS, greedy, write

import speculative_mamba as sm
from benchmarks.peer_engines import LlamaCpp
from benchmarks.peer_process import Remote
from speculative_mamba.layers.attention import Attention
from speculative_mamba.testing.oracle import full_forward

pytest.importorskip("llama_cpp")
gguf_files = pytest.importorskip("speculative_mamba.testing.gguf_files")

TOKENS = 48
SHAPES: dict[str, dict[str, Any]] = {  # of those that llama.cpp takes
    "mamba-hf": {"time_step_rank": 4},
    "falcon-mamba-hf": {"mixer_rms_eps": 1e-5},
    "mamba2-hf": {"num_heads": 8, "head_dim": 16, "state_size": 16},
    "llama-hf": {"intermediate_size": 96},
    "granite-hf": {"intermediate_size": 96},
    "granite-hybrid-hf": {"mamba_n_heads": 8, "mamba_d_state": 16, "shared_intermediate_size": 96},
    "lfm2-hf": {},
    "nemotron-h-hf": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "head_dim": 16},
    "jamba-hf": {"mamba_d_state": 16},
    "falcon-h1-hf": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_state": 16},
}


class Text(LlamaCpp):
    """llama.cpp as it writes greedy text."""

    def probe(self, prompt: list[int]) -> np.ndarray:
        """Logits after the prompt and after each of its own tokens."""
        logits = [self.prefill(prompt)[0].clone()]
        for _ in range(TOKENS - 1):
            logits.append(self.feed([int(logits[-1].argmax())])[0].clone())
        return torch.stack(logits).numpy()


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_text_is_that_of_llama_cpp(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / name, name, hidden_size=64, **SHAPES[name])
    path = gguf_files.write_gguf(folder, tmp_path / "model.gguf")
    with Remote(Text, path, "f32", 512) as theirs:
        logits = torch.from_numpy(theirs.call("probe", IDS[:5]))
    model = sm.load_model(path)
    text = greedy(model, TOKENS)
    assert logits.argmax(-1).tolist() == text[5:]
    exact = full_forward(model, text[:-1])[4:]
    bound = 5e-3 if any(isinstance(mixer, Attention) for mixer in model.mixers) else 1e-5  # keys and values are F16
    assert ((logits - exact).norm() / exact.norm()).item() < bound
