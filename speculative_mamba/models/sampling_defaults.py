"""Default sampling: what a model's ``generation_config.json`` recommends."""

from collections.abc import Mapping

from ..ops.sampling_params import SamplingParams
from ..ops.values import shown
from .folders import GENERATION_CONFIG

_DRAWN = ("temperature", "top_k", "top_p", "min_p")
# What is not implemented, with the value that changes nothing.
_UNSUPPORTED = {
    "num_beams": 1, "penalty_alpha": 0, "guidance_scale": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "top_h": None, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "bad_words_ids": None,
    "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0, "force_words_ids": None, "constraints": None, "watermarking_config": None,
    "dola_layers": None, "stop_strings": None,
}  # fmt: skip


def default_sampling(generation_config: Mapping[str, object]) -> SamplingParams:
    """Temperature, top-k, top-p, min-p and repetition penalty, as far as they are stated; without ``do_sample`` greedy.

    Raises:
        ValueError: a value is out of range, or calls for another way to generate.
    """
    stated = {name: value for name, value in generation_config.items() if value is not None}
    for name, neutral in _UNSUPPORTED.items():
        if stated.get(name, neutral) not in (neutral, [], {}):
            raise ValueError(f"{GENERATION_CONFIG} gives {name} = {shown(stated[name])}, which is not supported")
    draws = stated.get("do_sample", False)
    if not isinstance(draws, bool):
        raise ValueError(f"{GENERATION_CONFIG} gives do_sample = {shown(draws)}; true or false is needed")
    names = (*(_DRAWN if draws else ()), "repetition_penalty")
    chosen = {"temperature": 1.0} if draws else {}
    chosen |= {name: stated[name] for name in names if name in stated}
    try:
        return SamplingParams(**chosen)
    except ValueError as error:
        raise ValueError(f"{GENERATION_CONFIG}: {error}") from None
