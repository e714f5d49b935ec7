"""Checkpoints in a public format that cannot be loaded as they are: one line names what does not fit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from published import FORMATS

import speculative_mamba as sm

CONFIG, MAMBA = "config.json", "mamba_config.json"
HEADS = {"causal": True, "num_heads": 6, "head_dim": 8}
REFUSALS: list[tuple[str, str, dict[str, Any], str]] = [
    ("llama-hf", CONFIG, {"hidden_act": "gelu"}, "hidden_act"),
    ("llama-hf", CONFIG, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ("llama-hf", CONFIG, {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama-hf", CONFIG, {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    ("llama-hf", CONFIG, {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ("llama-hf", CONFIG, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama-hf", CONFIG, {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama-hf", CONFIG, {"attention_bias": "yes"}, "attention_bias"),
    ("llama-hf", CONFIG, {"head_dim": 7}, "head_dim"),
    *(
        (name, CONFIG, {key: value}, key)
        for name in ("granite-hf", "granite-hybrid-hf")
        for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        for value in (0, math.nan, math.inf, -1.0, "1", 1e39)
    ),
    *(
        ("granite-hybrid-hf", CONFIG, {key: value}, key)
        for key, value in {
            "num_local_experts": -1, "hidden_act": "gelu", "normalization_function": "layernorm",
            "position_embedding_type": "alibi", "mamba_n_heads": 5, "mamba_n_groups": 4, "mamba_d_head": 7,
            "mamba_d_state": 0, "mamba_expand": 1e9, "shared_intermediate_size": 0, "time_step_limit": [1, 0],
            "num_hidden_layers": 10**10, "hidden_size": math.inf, "layer_types": "mamba",
        }.items()
    ),
    *(
        (name, CONFIG, {key: value}, key)
        for name, changes in {
            "granite-moe-hf": {
                "num_local_experts": 0, "num_experts_per_tok": 7, "hidden_act": "gelu", "intermediate_size": 0,
            },
            "granite-moe-hybrid-hf": {"num_local_experts": 1025, "num_experts_per_tok": 0, "intermediate_size": 1e9},
            "lfm2-moe-hf": {
                "num_experts": 0, "num_experts_per_tok": 7, "moe_intermediate_size": 0, "num_dense_layers": -1,
                "use_expert_bias": 1, "norm_topk_prob": "yes", "routed_scaling_factor": 0, "intermediate_size": -1,
            },
            "nemotron-h-moe-hf": {
                "n_routed_experts": 1025, "num_experts_per_tok": 10, "moe_intermediate_size": 0, "n_group": 5,
                "topk_group": 5, "norm_topk_prob": 1, "routed_scaling_factor": math.nan, "moe_latent_size": 8,
                "n_shared_experts": 2, "moe_shared_expert_intermediate_size": 0, "mlp_hidden_act": "gelu",
            },
            "jamba-moe-hf": {"num_experts": -1, "num_experts_per_tok": 6, "expert_layer_period": 0},
        }.items()
        for key, value in changes.items()
    ),
    ("nemotron-h-moe-hf", CONFIG, {"n_group": 12}, "n_group"),
    ("granite-hybrid-hf", CONFIG, {"layer_types": ["mamba", "attention"]}, "2 layer_types, but num_hidden_layers = 3"),
    ("granite-hybrid-hf", CONFIG, {"layer_types": ["mamba", "attention", "conv"]}, "'conv' in layer_types"),
    ("granite-hybrid-hf", CONFIG, {"architectures": ["GraniteMoeForCausalLM"]}, "GraniteMoeForCausalLM"),
    *(
        ("lfm2-hf", CONFIG, {key: value}, key)
        for key, value in {
            "conv_L_cache": 9, "conv_bias": 1, "intermediate_size": 0, "block_multiple_of": 0, "norm_eps": 0,
            "block_ffn_dim_multiplier": -1, "block_ff_dim": 1.5, "block_auto_adjust_ff_dim": "no",
            "block_use_swiglu": False, "use_pos_enc": False, "num_key_value_heads": 3, "tie_embedding": "no",
            "layer_types": ["conv", "sliding_attention", "conv"],
        }.items()
    ),
    ("lfm2-hf", CONFIG, {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    *(
        (name, CONFIG, {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, "'full_attention'")
        for name in ("lfm2-hf", "llama-hf", "falcon-h1-hf")
    ),
    ("lfm2-hf", CONFIG, {"layer_types": None, "full_attn_idxs": [3]}, "full_attn_idxs"),
    ("lfm2-hf", CONFIG, {"block_ffn_dim_multiplier": 1e9}, "intermediate_size"),
    *(
        ("nemotron-h-hf", CONFIG, {key: value}, key)
        for key, value in {
            "mamba_hidden_act": "gelu", "mlp_hidden_act": "gelu", "n_groups": 4, "mamba_num_heads": 0,
            "mamba_head_dim": 10**9, "ssm_state_size": -1, "conv_kernel": 1, "time_step_limit": [1, 0],
            "intermediate_size": 0, "sliding_window": 64, "num_key_value_heads": 3, "head_dim": 0,
            "layers_block_type": ["linear_attention", "conv"], "num_hidden_layers": 5, "use_bias": 1,
        }.items()
    ),
    *(
        ("nemotron-h-hf", CONFIG, {"layers_block_type": None, "hybrid_override_pattern": pattern}, word)
        for pattern, word in (
            ("M|*", "'|' in hybrid_override_pattern"),
            (None, "hybrid_override_pattern"), ("", "hybrid_override_pattern"), (7, "hybrid_override_pattern"),
        )
    ),
    *(
        ("jamba-hf", CONFIG, {key: value}, key)
        for key, value in {
            "hidden_act": "gelu", "sliding_window": 64, "mamba_inner_layernorms": False, "attn_layer_period": 0,
            "attn_layer_offset": 2, "num_key_value_heads": 3,
            "intermediate_size": 0, "mamba_d_state": 0, "mamba_expand": 1e9, "mamba_dt_rank": None, "mamba_d_conv": 1,
            "mamba_conv_bias": 1, "rms_norm_eps": 0,
        }.items()
    ),
    ("jamba-hf", CONFIG, {"num_experts": 2, "expert_layer_offset": 2}, "expert_layer_offset"),
    *(
        ("bamba-hf", CONFIG, {key: value}, key)
        for key, value in {
            "hidden_act": "gelu", "attn_layer_indices": [3], "partial_rotary_factor": 0.25, "attn_rotary_emb": 8,
            "mamba_n_heads": 5, "mamba_d_head": 7, "mamba_n_groups": 4, "time_step_limit": [1, 0], "mlp_bias": 1,
        }.items()
    ),
    ("bamba-hf", CONFIG, {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    *(
        ("bamba-hf", CONFIG, {"rope_parameters": {"partial_rotary_factor": factor}}, "partial_rotary_factor")
        for factor in (0.4, 1.5, 0, "half")
    ),
    *(
        ("falcon-h1-hf", CONFIG, {key: value}, key)
        for key, value in {
            "hidden_act": "gelu", "key_multiplier": 0, "lm_head_multiplier": -1, "ssm_in_multiplier": math.nan,
            "mlp_multipliers": [1.0], "ssm_multipliers": [1, 1, 1, 1, "1"], "mamba_d_ssm": 96, "mamba_d_head": 7,
            "mamba_rms_norm": "no", "mamba_norm_before_gate": 1, "attention_bias": True, "mamba_n_groups": 4,
        }.items()
    ),
    ("mamba2-hf", CONFIG, {"hidden_act": "gelu"}, "hidden_act"),
    ("mamba2-hf", CONFIG, {"n_groups": 4}, "n_groups"),
    ("mamba2-hf", CONFIG, {"head_dim": 7}, "head_dim"),
    ("mamba2-hf", CONFIG, {"time_step_limit": [1, 0]}, "time_step_limit"),
    ("mamba2-hf", CONFIG, {"time_step_limit": [0.0, {"__float__": "many"}]}, "time_step_limit"),
    ("mamba2-hf", CONFIG, {"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
    ("falcon-mamba-hf", CONFIG, {"mixer_rms_eps": -1}, "mixer_rms_eps"),
    ("falcon-mamba-hf", CONFIG, {"hidden_act": "relu"}, "hidden_act"),
    ("mamba2-state-spaces", CONFIG, {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
    ("mamba2-state-spaces", CONFIG, {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_ssm": 16}}, "d_ssm"),
    ("mamba2-state-spaces", CONFIG, {"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "headdim"),
    ("mamba2-state-spaces", CONFIG, {"ssm_cfg": {"layer": "Mamba2", "headdim": 8, "shape": 1}}, "ssm_cfg.shape"),
    ("mamba2-state-spaces", CONFIG, {"ssm_cfg": {"layer": "S6"}}, "S6"),
    ("mamba2attn-state-spaces", CONFIG, {"attn_layer_idx": [7]}, "attn_layer_idx"),
    ("mamba2attn-state-spaces", CONFIG, {"attn_cfg": {"causal": False, "num_heads": 6}}, "causal"),
    ("mamba2attn-state-spaces", CONFIG, {"attn_cfg": {"num_heads": 6}}, "causal"),
    *(
        ("mamba2attn-state-spaces", CONFIG, {"attn_cfg": {**HEADS, key: value}}, key)
        for key, value in {
            "rotary_emb_interleaved": True, "mlp_dim": 64, "rotary_emb_dim": 10, "num_heads_kv": 4, "window": 9,
            "softmax_scale": -1,
        }.items()
    ),
    ("mamba-in-llama", CONFIG, {"model_type": "gpt2"}, "gpt2"),
    ("mamba-in-llama", CONFIG, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    ("mamba-in-llama", MAMBA, {"hidden_act": "gelu"}, "hidden_act"),
    ("mamba-in-llama", MAMBA, {"ssm_cfg": {"d_state": 4, "proj_x_bias": True}}, "proj_x_bias"),
    ("mamba-in-llama", MAMBA, {"ssm_cfg": {"d_state": 5}}, "d_state"),
    ("mamba-in-llama", MAMBA, {"ssm_cfg": {"d_state": 4, "shape": 1}}, "shape"),
    ("mamba-in-llama", MAMBA, {"n_layer": 5}, "n_layer"),
    ("mamba-in-llama", MAMBA, {"intermediate_size": 0}, "intermediate_size"),
    ("mamba-in-llama", MAMBA, {"d_xb": 10}, "d_xb"),
    ("mamba-in-llama", MAMBA, {"attn_layers": [3]}, "attn_layers"),
    ("mamba2-in-llama", MAMBA, {"ssm_cfg": {"ngroups": 5, "d_state": 4}}, "ngroups"),
    ("mamba2-in-llama", MAMBA, {"ssm_cfg": {"ngroups": 6, "d_state": 4, "norm_before_gate": True}}, "norm_before_gate"),
    *(
        ("llama-hf", CONFIG, {"model_type": kind, "architectures": [name]}, kind)
        for kind, name in {
            "mistral": "MistralForCausalLM", "gpt2": "GPT2LMHeadModel",
            "granitemoeshared": "GraniteMoeSharedForCausalLM", "rwkv": "RwkvForCausalLM",
            "zamba2": "Zamba2ForCausalLM",
        }.items()
    ),
    ("llama-hf", CONFIG, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "changes", "word"), REFUSALS, ids=str)
def test_refused_by_name_before_weights_are_read(
    name: str, file: str, changes: dict[str, Any], word: str, tmp_path: Path
) -> None:
    FORMATS[name](tmp_path, 0)
    for weights in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")):
        weights.unlink()
    config = tmp_path / file
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ValueError) as caught:
        sm.load_model(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message and word in message
    assert "weights" not in message and (file == CONFIG or MAMBA in message)


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_tensor_and_one_of_another_shape_are_named(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    FORMATS[name](tmp_path, 0)
    [path] = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]
    pickled = path.suffix == ".bin"
    tensors = torch.load(path) if pickled else load_file(path)
    for victim in [key for key in tensors if ".1." in key or key.endswith(("norm.weight", "lm_head.weight"))]:
        wrong = {**tensors, victim: torch.zeros(*tensors[victim].shape[:-1], tensors[victim].shape[-1] + 1)}
        for broken in (wrong, {key: value for key, value in tensors.items() if key != victim}):
            torch.save(broken, path) if pickled else save_file(broken, path)
            with pytest.raises(ValueError) as caught:
                sm.load_model(tmp_path)
            assert victim in str(caught.value) and "\n" not in str(caught.value)
