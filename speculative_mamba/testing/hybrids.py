"""The config.json of published hybrids, as far as their shapes and what they compute depend on it."""

from typing import Any


def _layers(kind: str, count: int, attention: str, *attending: int) -> list[str]:
    """The kind of each of so many layers."""
    return [attention if i in attending else kind for i in range(count)]


_GRANITE = {
    "model_type": "granitemoehybrid", "vocab_size": 100352, "num_local_experts": 0, "position_embedding_type": "nope",
    "attention_multiplier": 0.015625, "embedding_multiplier": 12, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
_LFM2 = {
    "model_type": "lfm2", "vocab_size": 65536, "norm_eps": 1e-5, "rope_theta": 1e6, "conv_L_cache": 3,
    "conv_bias": False, "num_key_value_heads": 8,
}  # fmt: skip

HYBRIDS: dict[str, dict[str, Any]] = {
    "granite-4.0-h-350m": _GRANITE | {
        "hidden_size": 768, "num_hidden_layers": 32, "shared_intermediate_size": 2048, "num_attention_heads": 12,
        "num_key_value_heads": 4, "mamba_n_heads": 48, "mamba_d_head": 32, "residual_multiplier": 0.246,
        "logits_scaling": 3, "layer_types": _layers("mamba", 32, "attention", 10, 13, 17, 27),
    },
    "granite-4.0-h-micro": _GRANITE | {
        "hidden_size": 2048, "num_hidden_layers": 40, "shared_intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "mamba_n_heads": 64, "mamba_d_head": 64, "residual_multiplier": 0.22,
        "logits_scaling": 8, "layer_types": _layers("mamba", 40, "attention", 5, 15, 25, 35),
    },
    "granite-4.0-h-tiny": _GRANITE | {
        "hidden_size": 1536, "num_hidden_layers": 40, "shared_intermediate_size": 1024, "num_attention_heads": 12,
        "num_key_value_heads": 4, "mamba_n_heads": 48, "mamba_d_head": 64, "residual_multiplier": 0.22,
        "logits_scaling": 6, "layer_types": _layers("mamba", 40, "attention", 5, 15, 25, 35),
        "num_local_experts": 64, "num_experts_per_tok": 6, "intermediate_size": 512,
    },
    "lfm2-350m": _LFM2 | {
        "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "block_ff_dim": 6656,
        "layer_types": _layers("conv", 16, "full_attention", 2, 5, 8, 10, 12, 14),
    },
    "lfm2-2.6b": _LFM2 | {
        "hidden_size": 2048, "num_hidden_layers": 30, "num_attention_heads": 32, "block_ff_dim": 10752,
        "block_auto_adjust_ff_dim": False,
        "layer_types": _layers("conv", 30, "full_attention", 2, 5, 9, 13, 17, 21, 24, 27),
    },
    "nemotron-nano-9b-v2": {
        "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4480, "intermediate_size": 15680,
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128,
        "mamba_head_dim": 80, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    },
    "jamba-3b": {
        "model_type": "jamba", "vocab_size": 65536, "hidden_size": 2560, "num_hidden_layers": 28,
        "intermediate_size": 8192, "num_experts": 1, "num_attention_heads": 20, "num_key_value_heads": 1,
        "attn_layer_period": 14, "attn_layer_offset": 7, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
        "mamba_dt_rank": 160, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "falcon-h1-1.5b": {
        "model_type": "falcon_h1", "vocab_size": 65537, "hidden_size": 2048, "num_hidden_layers": 24,
        "intermediate_size": 4608, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
        "rope_theta": 1e11, "mamba_d_ssm": 3072, "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 256,
        "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        # Multipliers are the 0.5B's: time depends on which of them are there, not on their values.
        "embedding_multiplier": 5.656854249492381, "lm_head_multiplier": 0.0390625, "key_multiplier": 0.390625,
        "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.23570226039551587, "mlp_multipliers": [0.8838834764831844, 0.5859375],
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    },
}  # fmt: skip

# The small model with the same tokens, where one is published.
DRAFTS = {
    "granite-4.0-h-micro": "granite-4.0-h-350m",
    "granite-4.0-h-tiny": "granite-4.0-h-350m",
    "lfm2-2.6b": "lfm2-350m",
}
