"""Every architecture in its public format: parity with an oracle that shares no code, options, dtypes."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from published import FORMATS, VOCABULARY, WIDTH, Oracle, mamba_in_llama

import speculative_mamba as sm
from speculative_mamba.ops.expert_weight import ExpertWeight

IDS = [5, 9, 33, 2, 60, 17, 41, 8, 8, 25, 3, 50]
formats = pytest.mark.parametrize("name", FORMATS)

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("mamba2-hf", {"n_groups": 1}),
    ("mamba2-hf", {"n_groups": 6, "use_bias": True}),
    ("mamba2-hf", {"use_conv_bias": False, "conv_kernel": 2}),
    ("mamba2-hf", {"tie_word_embeddings": True}),
    ("mamba2-hf", {"time_step_limit": (0.2, 0.9)}),
    ("mamba2-hf", {"layer_norm_epsilon": 0.1}),
    ("mamba2-hf", {"state_size": 16, "num_heads": 3, "head_dim": 16, "n_groups": 3}),
    ("falcon-mamba-hf", {"use_bias": True}),
    ("falcon-mamba-hf", {"use_conv_bias": False, "conv_kernel": 3}),
    ("falcon-mamba-hf", {"mixer_rms_eps": 0.1}),
    ("falcon-mamba-hf", {"tie_word_embeddings": True, "expand": 1}),
    ("llama-hf", {"attention_bias": True}),
    ("llama-hf", {"mlp_bias": True}),
    ("llama-hf", {"hidden_act": "relu2"}),
    ("llama-hf", {"head_dim": 10}),
    ("llama-hf", {"num_key_value_heads": 1}),
    ("llama-hf", {"num_key_value_heads": 4}),
    ("llama-hf", {"tie_word_embeddings": True}),
    ("llama-hf", {"rms_norm_eps": 0.1}),
    ("llama-hf", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("llama-hf", {"older_fields": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("llama-hf", {"older_fields": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}),
    ("granite-hf", {"attention_bias": True}),
    ("granite-hf", {"mlp_bias": True}),
    ("granite-hf", {"hidden_act": "relu2"}),
    ("granite-hf", {"head_dim": 10}),
    ("granite-hf", {"num_key_value_heads": 1}),
    ("granite-hf", {"tie_word_embeddings": True}),
    ("granite-hf", {"rms_norm_eps": 0.1}),
    ("granite-hf", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}),
    *(
        (name, {key: value})
        for name in ("granite-hf", "granite-hybrid-hf")
        for key, value in {
            "embedding_multiplier": 12,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 8,
        }.items()
    ),
    ("granite-hybrid-hf", {"layer_types": ["full_attention"] * 3}),
    ("granite-hybrid-hf", {"layer_types": None}),
    ("granite-hybrid-hf", {"position_embedding_type": "rope"}),
    ("granite-hybrid-hf", {"position_embedding_type": "rope", "rope_parameters": {**ROPE, "rope_theta": 50.0}}),
    ("granite-hybrid-hf", {"attention_bias": True}),
    ("granite-hybrid-hf", {"num_key_value_heads": 4}),
    ("granite-hybrid-hf", {"shared_intermediate_size": 20}),
    ("granite-hybrid-hf", {"mamba_n_groups": 2}),
    ("granite-hybrid-hf", {"mamba_n_heads": 3, "mamba_d_head": 16, "mamba_d_state": 16}),
    ("granite-hybrid-hf", {"mamba_expand": 3, "mamba_d_head": "auto"}),
    ("granite-hybrid-hf", {"mamba_d_conv": 2, "mamba_conv_bias": False}),
    ("granite-hybrid-hf", {"mamba_proj_bias": True}),
    ("granite-hybrid-hf", {"time_step_limit": (0.2, 0.9)}),
    ("granite-hybrid-hf", {"rms_norm_eps": 0.1}),
    ("granite-hybrid-hf", {"tie_word_embeddings": True}),
    ("lfm2-hf", {"layer_types": ["conv"] * 3}),
    ("lfm2-hf", {"layer_types": None}),
    ("lfm2-hf", {"layer_types": None, "full_attn_idxs": [0, 2]}),
    ("lfm2-hf", {"conv_L_cache": 4}),
    ("lfm2-hf", {"conv_bias": True}),
    ("lfm2-hf", {"intermediate_size": 30}),
    ("lfm2-hf", {"block_auto_adjust_ff_dim": False}),
    ("lfm2-hf", {"block_multiple_of": 16}),
    ("lfm2-hf", {"block_ffn_dim_multiplier": 1.3}),
    ("lfm2-hf", {"head_dim": 10}),
    ("lfm2-hf", {"num_key_value_heads": 4}),
    ("lfm2-hf", {"norm_eps": 0.1}),
    ("lfm2-hf", {"rope_parameters": ROPE}),
    ("lfm2-hf", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}),
    ("lfm2-hf", {"tie_word_embeddings": True}),
    ("nemotron-h-hf", {"layers_block_type": ["linear_attention"] * 2}),
    ("nemotron-h-hf", {"layers_block_type": ["full_attention", "mlp"]}),
    ("nemotron-h-hf", {"intermediate_size": 20}),
    ("nemotron-h-hf", {"mlp_bias": True}),
    ("nemotron-h-hf", {"mlp_hidden_act": "silu"}),
    ("nemotron-h-hf", {"head_dim": 6}),
    ("nemotron-h-hf", {"num_key_value_heads": 4}),
    ("nemotron-h-hf", {"n_groups": 3}),
    ("nemotron-h-hf", {"mamba_num_heads": 4, "mamba_head_dim": 20, "ssm_state_size": 16}),
    ("nemotron-h-hf", {"conv_kernel": 2, "use_conv_bias": False}),
    ("nemotron-h-hf", {"use_bias": True}),
    ("nemotron-h-hf", {"time_step_limit": (1.5, math.inf)}),
    ("nemotron-h-hf", {"layer_norm_epsilon": 0.1}),
    ("jamba-hf", {"attn_layer_period": 4, "attn_layer_offset": 2}),
    ("jamba-hf", {"attn_layer_offset": 0}),
    ("jamba-hf", {"attn_layer_period": 5, "attn_layer_offset": 4}),
    ("jamba-hf", {"attn_layer_period": 1, "attn_layer_offset": 0}),
    ("jamba-hf", {"num_experts": 8, "expert_layer_period": 4, "expert_layer_offset": 3, "intermediate_size": 20}),
    ("jamba-hf", {"head_dim": 10}),
    ("jamba-hf", {"num_key_value_heads": 4}),
    ("jamba-hf", {"mamba_d_state": 16, "mamba_expand": 3}),
    ("jamba-hf", {"mamba_dt_rank": 5}),
    ("jamba-hf", {"mamba_d_conv": 2, "mamba_conv_bias": False}),
    ("jamba-hf", {"mamba_proj_bias": True}),
    ("jamba-hf", {"rms_norm_eps": 0.1}),
    ("jamba-hf", {"tie_word_embeddings": True}),
    ("granite-moe-hf", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 20}),
    ("granite-moe-hybrid-hf", {"num_experts_per_tok": 8}),
    ("granite-moe-hybrid-hf", {"intermediate_size": 20, "shared_intermediate_size": 30}),
    ("lfm2-moe-hf", {"num_dense_layers": 0}),
    ("lfm2-moe-hf", {"num_dense_layers": 5}),
    ("lfm2-moe-hf", {"use_expert_bias": False}),
    ("lfm2-moe-hf", {"norm_topk_prob": False}),
    ("lfm2-moe-hf", {"routed_scaling_factor": 2.5}),
    ("lfm2-moe-hf", {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 20}),
    ("nemotron-h-moe-hf", {"n_group": 1, "topk_group": 1}),
    ("nemotron-h-moe-hf", {"n_group": 6, "topk_group": 2}),
    ("nemotron-h-moe-hf", {"norm_topk_prob": False}),
    ("nemotron-h-moe-hf", {"routed_scaling_factor": 1}),
    ("nemotron-h-moe-hf", {"mlp_hidden_act": "silu"}),
    ("nemotron-h-moe-hf", {"mlp_bias": True}),
    ("nemotron-h-moe-hf", {"moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 30}),
    ("nemotron-h-moe-hf", {"n_routed_experts": 8, "num_experts_per_tok": 6}),
    ("jamba-moe-hf", {"expert_layer_offset": 0}),
    ("jamba-moe-hf", {"expert_layer_period": 1, "expert_layer_offset": 0}),
    ("jamba-moe-hf", {"num_experts": 8, "num_experts_per_tok": 8}),
    ("bamba-hf", {"attn_layer_indices": [0, 2], "intermediate_size": 20}),
    ("bamba-hf", {"attn_layer_indices": None}),
    ("bamba-hf", {"head_dim": 12}),
    ("bamba-hf", {"num_key_value_heads": 3}),
    ("bamba-hf", {"attention_bias": True}),
    ("bamba-hf", {"mlp_bias": True}),
    ("bamba-hf", {"older_fields": True, "rope_parameters": {**ROPE, "rope_theta": 50.0}}),
    ("bamba-hf", {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}),
    ("bamba-hf", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.25}}),
    ("bamba-hf", {"mamba_n_groups": 2}),
    ("bamba-hf", {"mamba_n_heads": 3, "mamba_d_head": 16, "mamba_d_state": 16}),
    ("bamba-hf", {"mamba_expand": 3}),
    ("bamba-hf", {"mamba_d_conv": 2, "mamba_conv_bias": False}),
    ("bamba-hf", {"mamba_proj_bias": True}),
    ("bamba-hf", {"time_step_limit": (0.2, 0.9)}),
    ("bamba-hf", {"rms_norm_eps": 0.1}),
    ("bamba-hf", {"tie_word_embeddings": True}),
    *(
        ("falcon-h1-hf", {key: value})
        for key, value in {
            "embedding_multiplier": 1.0,
            "lm_head_multiplier": 1.0,
            "mlp_multipliers": [1.5, 0.9],
            "key_multiplier": 0.4,
            "attention_in_multiplier": 1.0,
            "attention_out_multiplier": 1.0,
            "ssm_in_multiplier": 1.0,
            "ssm_out_multiplier": 1.0,
            "ssm_multipliers": None,
            "mlp_bias": True,
            "projectors_bias": True,
            "mamba_proj_bias": True,
            "head_dim": 10,
            "num_key_value_heads": 4,
            "mamba_n_groups": 2,
            "time_step_limit": (0.2, 0.9),
            "rms_norm_eps": 0.1,
            "tie_word_embeddings": True,
            "intermediate_size": 20,
            "rope_parameters": {**ROPE, "rope_theta": 1e11},
        }.items()
    ),
    ("falcon-h1-hf", {"mamba_d_ssm": None, "mamba_expand": 3}),
    ("falcon-h1-hf", {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}),
    ("falcon-h1-hf", {"mamba_rms_norm": True, "mamba_n_groups": 2}),
    ("falcon-h1-hf", {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2}),
    ("falcon-h1-hf", {"mamba_d_conv": 2, "mamba_conv_bias": False}),
    ("falcon-h1-hf", {"attention_bias": True, "attention_in_multiplier": 1.0}),
    ("mamba2-state-spaces", {"ssm_cfg": {"ngroups": 2}}),
    ("mamba2-state-spaces", {"ssm_cfg": {"D_has_hdim": True}}),
    ("mamba2-state-spaces", {"ssm_cfg": {"rmsnorm": False}}),
    ("mamba2-state-spaces", {"ssm_cfg": {"dt_limit": [0.1, 0.7]}}),
    ("mamba2-state-spaces", {"ssm_cfg": {"bias": True}}),
    ("mamba2-state-spaces", {"ssm_cfg": {"expand": 3, "headdim": 12, "d_state": 16}}),
    ("mamba2-state-spaces", {"tie_embeddings": True}),
    ("mamba2-state-spaces", {"d_intermediate": 100}),
    ("mamba2attn-state-spaces", {"attn_cfg": {"num_heads_kv": 2}}),
    ("mamba2attn-state-spaces", {"attn_cfg": {"d_conv": 0}}),
    ("mamba2attn-state-spaces", {"attn_cfg": {"qkv_proj_bias": True, "out_proj_bias": True}}),
    ("mamba2attn-state-spaces", {"attn_cfg": {"softmax_scale": 0.1}}),
    ("mamba2attn-state-spaces", {"attn_cfg": {"rotary_emb_dim": 0}}),
    ("mamba2attn-state-spaces", {"attn_cfg": {"rotary_emb_dim": 8, "rotary_emb_base": 50.0}}),
    ("mamba2attn-state-spaces", {"attn_layer_idx": [0, 2], "d_intermediate": 100}),
    ("mamba-in-llama", {"ssm_cfg": {"repeat_kv_before_conv": False}}),
    ("mamba-in-llama", {"ssm_cfg": {"dt_rank": 5}}),
    ("mamba-in-llama", {"attn_layers": []}),
    ("mamba-in-llama", {"base": {"tie_word_embeddings": True}}),
    (
        "mamba2-in-llama",
        {"base": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "rope_theta": 9.0}},
    ),
    ("mamba2-in-llama", {"ssm_cfg": {"repeat_kv_before_conv": True}}),
    ("mamba2-in-llama", {"ssm_cfg": {"D_has_hdim": True}}),
    ("mamba2-in-llama", {"ssm_cfg": {"ngroups": 3, "d_state": 8}, "d_xb": 8, "attn_layers": [0]}),
]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
OPTIONS += [("llama-hf", {"rope_parameters": LLAMA3, "older_fields": older, "head_dim": 16}) for older in (False, True)]


# family -> a second set of options, of those that change what a state is or how it goes on
HYBRIDS = {
    "granite-hybrid-hf": {
        "position_embedding_type": "rope", "num_key_value_heads": 4, "mamba_n_groups": 2, "mamba_proj_bias": True,
        "time_step_limit": (0.2, 0.9),
    },
    "granite-moe-hybrid-hf": {"num_experts_per_tok": 8, "mamba_d_conv": 2, "mamba_conv_bias": False},
    "lfm2-hf": {"conv_L_cache": 4, "conv_bias": True, "head_dim": 10},
    "lfm2-moe-hf": {"use_expert_bias": False, "norm_topk_prob": False, "conv_L_cache": 4},
    "nemotron-h-hf": {"mlp_hidden_act": "silu", "n_groups": 3, "conv_kernel": 2, "use_bias": True},
    "nemotron-h-moe-hf": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "mlp_bias": True},
    "jamba-hf": {"attn_layer_offset": 0, "mamba_d_state": 16, "mamba_expand": 3, "mamba_proj_bias": True},
    "jamba-moe-hf": {"expert_layer_period": 1, "expert_layer_offset": 0, "mamba_d_conv": 2},
    "bamba-hf": {"attn_layer_indices": [0, 2], "intermediate_size": 20, "mamba_n_groups": 2, "attention_bias": True},
    "falcon-h1-hf": {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2},
}  # fmt: skip


def logits(model: sm.MambaLM, ids: list[int] = IDS) -> torch.Tensor:
    return model.verify(torch.tensor([ids]), model.new_cache(1, len(ids)), torch.zeros(1, dtype=torch.int32))[0]


def assert_parity(model: sm.MambaLM, oracle: Oracle, tokens: int) -> None:
    """Logits are close. Every token of the greedy text is the one that the oracle finds likeliest there, unless two are
    closer than the errors."""
    text = sm.generate(model, [IDS], draft=model, max_new_tokens=tokens, stop_token_ids=()).sequences[0]
    exact = oracle(text.tolist()).double()
    size = exact.abs().max().item()
    torch.testing.assert_close(logits(model).double(), exact[: len(IDS)], rtol=0, atol=2e-5 * size)
    chosen = exact[len(IDS) - 1 : -1].gather(1, text[len(IDS) :, None])[:, 0]
    assert (exact[len(IDS) - 1 : -1].amax(1) - chosen).max() < 1e-4 * size
    assert len(set(text.tolist()[len(IDS) :])) > 4, "a text of one token would show little"


@formats
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parity(name: str, backend: str, tmp_path: Path) -> None:
    """Catches: the rotary base; halves of fc1; SiLU after attention's convolution; dt bias once in MambaInLlama."""
    oracle = FORMATS[name](tmp_path, 0)
    assert_parity(sm.load_model(tmp_path, backend=backend), oracle, 64)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda value: str(value).replace(" ", ""))
def test_parity_of_options(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Catches: repeated convolution weights; a norm in one group."""
    oracle = FORMATS[name](tmp_path, 1, **options)
    model = sm.load_model(tmp_path)
    exact = oracle(IDS).double()
    torch.testing.assert_close(logits(model).double(), exact, rtol=0, atol=2e-5 * exact.abs().max().item())
    other = FORMATS[name](tmp_path, 1)(IDS).double()
    assert not torch.allclose(other, exact, rtol=1e-3), "the option must make a difference, or this shows nothing"


def test_kinds_of_layers_have_two_spellings(tmp_path: Path) -> None:
    """transformers writes one, the published models of Granite 4.0 have the other."""
    oracle = FORMATS["granite-hybrid-hf"](
        tmp_path, 1, spelling={"linear_attention": "mamba", "full_attention": "attention"}
    )
    torch.testing.assert_close(logits(sm.load_model(tmp_path)), oracle(IDS), rtol=0, atol=1e-4)


def test_experts_have_other_spellings(tmp_path: Path) -> None:
    """Nemotron's pattern of letters, and Jamba's number of experts as other families call it."""
    for name, spelling in {
        "nemotron-h-moe-hf": {"layers_block_type": None, "hybrid_override_pattern": "ME*E"},
        "jamba-moe-hf": {"num_experts": None, "num_local_experts": 5},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        oracle = FORMATS[name](folder, 1)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | spelling))
        torch.testing.assert_close(logits(sm.load_model(folder)), oracle(IDS), rtol=0, atol=1e-4)


def test_older_fields_of_lfm2(tmp_path: Path) -> None:
    """The spelling of the first published configs, as transformers reads it. Catches: Llama's rotary base."""
    transformers = pytest.importorskip("transformers")
    FORMATS["lfm2-hf"](tmp_path, 1, tie_word_embeddings=True)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    for key in ("layer_types", "rope_parameters", "intermediate_size", "tie_word_embeddings"):
        del written[key]
    older = {"full_attn_idxs": [1], "block_ff_dim": 54, "tie_embedding": True}
    for rotary in ({}, {"rope_theta": 50.0}):
        path.write_text(json.dumps(written | older | rotary))
        model = transformers.Lfm2ForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            exact = model(torch.tensor([IDS]), use_cache=False).logits[0]
        torch.testing.assert_close(logits(sm.load_model(tmp_path)), exact, rtol=0, atol=2e-5 * exact.abs().max().item())


@pytest.mark.parametrize(
    "written",
    [
        {"layers_block_type": None, "hybrid_override_pattern": "M-*M", "num_hidden_layers": 4},
        {"layers_block_type": ["mamba", "mlp", "attention", "mamba"]},
        {"layers_block_type": None, "hybrid_override_pattern": "M-*M", "n_groups": None, "mamba_n_groups": 2},
    ],
    ids=str,
)
def test_older_fields_of_nemotron_h(written: dict[str, Any], tmp_path: Path) -> None:
    """The published models have a pattern of letters."""
    exact = FORMATS["nemotron-h-hf"](tmp_path, 1, written)(IDS)
    torch.testing.assert_close(logits(sm.load_model(tmp_path)), exact, rtol=0, atol=2e-5 * exact.abs().max().item())


@pytest.mark.parametrize(("lookahead", "rollback"), [(1, "snapshots"), (4, "replay")])
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, other in HYBRIDS.items() for options in ({}, other)]
)
def test_a_hybrid_with_any_draft_is_itself(
    name: str, options: dict[str, Any], lookahead: int, rollback: str, tmp_path: Path
) -> None:
    """A model without Mamba, prompt lookup, and the model itself: greedy bits, and the text of one seed."""
    models = {}
    for part in (name, "granite-hf", "llama-hf"):
        (tmp_path / part).mkdir()
        FORMATS[part](tmp_path / part, 3, **(options if part == name else {}))
        models[part] = sm.load_model(tmp_path / part, rollback=rollback)
    target, sampling = models.pop(name), sm.SamplingParams(temperature=0.9, seed=5)
    request = {"stop_token_ids": (), "output_logits": True}
    plain = sm.generate(target, [IDS], max_new_tokens=64, **request)
    sampled = sm.generate(target, [IDS], max_new_tokens=16, sampling=sampling, **request)
    for draft in (*models.values(), "ngram", target):
        result = sm.generate(target, [IDS], draft=draft, lookahead=lookahead, max_new_tokens=64, **request)
        assert torch.equal(result.sequences[0], plain.sequences[0]) and torch.equal(result.logits[0], plain.logits[0])
        assert result.stats.tested or draft == "ngram"
        assert draft is not target or result.stats.accepted == result.stats.tested
        result = sm.generate(
            target, [IDS], draft=draft, lookahead=lookahead, max_new_tokens=16, sampling=sampling, acceptance="coupled",
            **request,
        )  # fmt: skip
        assert torch.equal(result.sequences[0], sampled.sequences[0])


@pytest.mark.parametrize("rollback", ["snapshots", "replay"])
def test_a_model_without_any_state(rollback: str, tmp_path: Path) -> None:
    """A pattern of MLPs alone: parity, in a batch with a draft, and with a cache."""
    oracle = FORMATS["nemotron-h-hf"](tmp_path, 3, layers_block_type=["mlp"] * 2, num_hidden_layers=2)
    target = sm.load_model(tmp_path, rollback=rollback)
    exact = oracle(IDS)
    torch.testing.assert_close(logits(target), exact, rtol=0, atol=2e-5 * exact.abs().max().item())
    prompts, options = [IDS, IDS[:1]], {"stop_token_ids": ()}
    plain = [sm.generate(target, [ids], max_new_tokens=16, **options).sequences[0].tolist() for ids in prompts]
    cache = sm.GenerationCache()
    for draft, tokens in (("ngram", 7), (target, 9)):
        result = sm.generate(target, prompts, draft=draft, max_new_tokens=tokens, cache=cache, **options)
        prompts = [row.tolist() for row in result.sequences]
    assert prompts == plain


def test_every_format_has_a_row_in_the_documentation() -> None:
    """Named by the tests of this file that back it."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    for name in FORMATS:
        assert any(f"`{name}`" in row for row in rows), f"{name} has no row in docs/models.md"
    for named in re.findall(r"`([\w-]+-(?:hf|state-spaces|llama))`", "".join(rows)):
        assert named in FORMATS, f"docs/models.md names {named}, which no test knows"


def test_merged_projections(tmp_path: Path) -> None:
    """The spelling that the authors' inference code makes of a checkpoint."""
    oracle = mamba_in_llama(tmp_path, 1, merged=True)
    exact = oracle(IDS).double()
    actual = logits(sm.load_model(tmp_path)).double()
    torch.testing.assert_close(actual, exact, rtol=0, atol=2e-5 * exact.abs().max().item())


def test_attention_and_mlps_of_the_oracle_are_a_llama(tmp_path: Path) -> None:
    """A hybrid without Mamba layers is a Llama: the forward pass written for these tests agrees with transformers."""
    transformers = pytest.importorskip("transformers")
    oracle = mamba_in_llama(tmp_path, 0, attn_layers=[0, 1, 2])
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(oracle(IDS).float(), model(torch.tensor([IDS])).logits[0], rtol=1e-4, atol=1e-4)


def test_mamba2_of_the_oracle_is_that_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = FORMATS["mamba2-state-spaces"](tmp_path, 0, ssm_cfg={"ngroups": 2})
    config = transformers.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, state_size=9, num_heads=6, head_dim=8,
        n_groups=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config).eval()
    tensors = torch.load(tmp_path / "pytorch_model.bin")
    model.load_state_dict({key.replace("embedding.", "embeddings."): value for key, value in tensors.items()})
    with torch.no_grad():
        torch.testing.assert_close(oracle(IDS).float(), model(torch.tensor([IDS])).logits[0], rtol=1e-4, atol=1e-4)


@formats
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.06), ("float16", 0.01)])
def test_other_dtypes(name: str, dtype: str, bound: float, tmp_path: Path) -> None:
    FORMATS[name](tmp_path, 0)
    model, stored = sm.load_model(tmp_path, dtype=dtype), sm.load_model(tmp_path)
    expected = logits(stored)
    errors = (logits(model) - expected).pow(2).mean(1)
    if "-moe-" in name:  # a token that is nearly undecided may go to another expert
        errors = errors.sort().values[:-1]
    assert errors.mean().sqrt() / expected.pow(2).mean().sqrt() < bound
    assert sm.generate(model, [IDS], max_new_tokens=5, stop_token_ids=()).stats.tokens == 5
    assert model.weight_bytes < stored.weight_bytes


# A is computed, the convolution's weight transposed, and what is repeated or made up is small.
COPIED = ("A", "conv_weight", "conv_bias", "inv_freq", "q_norm", "k_norm")


@formats
def test_weights_lie_in_the_mapped_file(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path, 0)
    model, maps = sm.load_model(tmp_path), Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    lines = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(tmp_path) in line]
    ranges = [(int(begin, 16), int(end, 16)) for begin, end in lines]
    for mixer in model.mixers:
        for key, value in vars(mixer).items():
            value = value.matrices if isinstance(value, ExpertWeight) else value
            for weight in value if isinstance(value, tuple) else (value,):
                if isinstance(weight, torch.Tensor) and key not in COPIED and not (weight == 1).all():
                    assert any(begin <= weight.data_ptr() < end for begin, end in ranges), f"{key} was copied"
