"""What generation_config.json recommends."""

import math

import pytest

import speculative_mamba as sm
from speculative_mamba.models.sampling_defaults import default_sampling


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": None}, {"temperature": 0.6, "top_p": 0.95}),
        (
            {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05, "top_k": 20},
            {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05, "top_k": 20},
        ),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"temperature": 0.6, "top_k": 50, "num_beams": 1, "typical_p": 1.0, "suppress_tokens": []}, {}),
    ],
)
def test_what_is_stated(content, expected):
    assert default_sampling(content | {"eos_token_id": [1, 2], "_from_model_config": True}) == sm.SamplingParams(
        **expected
    )


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature"), ({"do_sample": True, "top_p": 0}, "top_p"),
        ({"do_sample": True, "top_k": 1.5}, "top_k"), ({"do_sample": True, "min_p": math.nan}, "min_p"),
        ({"repetition_penalty": -1}, "repetition_penalty"), ({"do_sample": "yes"}, "do_sample"),
        ({"num_beams": 4}, "num_beams"),
        ({"stop_strings": ["."]}, "stop_strings"), ({"forced_eos_token_id": 2}, "forced_eos_token_id"),
        ({"exponential_decay_length_penalty": [9, 1.1]}, "exponential_decay_length_penalty"),
        ({"watermarking_config": {"bias": 2.0}}, "watermarking_config"),
        ({"suppress_tokens": [3]}, "suppress_tokens"), ({"do_sample": True, "typical_p": 0.9}, "typical_p"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_or_is_not_supported(content, word):
    with pytest.raises(ValueError, match=rf"^generation_config\.json.* ?{word}"):
        default_sampling(content)
