"""Checks what a caller hands to ``generate``."""

from collections.abc import Callable, Collection, Sequence

from ..models.runner import LanguageModel
from ..models.tokenizer import tokenizer_of
from ..models.vocabulary import check_same_vocabulary, known_vocabulary
from ..ops.sampling_params import SamplingParams, of_rows
from ..ops.values import is_int, shown
from .cache import GenerationCache
from .drafts import Draft, Drafter
from .logprobs import MAX_LOGPROBS

ACCEPTANCES = ("rejection", "coupled")
NAMED_DRAFTS = ("ngram",)
MAX_LOOKAHEAD = 15
MAX_NEW_TOKENS = 2**31 - 1


def check_models(target: object, draft: object) -> None:
    """Target and draft of ``generate``.

    Raises:
        ValueError: one is no model, or they do not fit together.
    """
    if not isinstance(target, LanguageModel) or isinstance(target, type):
        raise ValueError(f"target must be a model, as load_model gives it, got {type(target).__name__}")
    if isinstance(draft, str) and draft not in NAMED_DRAFTS:
        raise ValueError(f"unknown draft {shown(draft)}; by name there is: {', '.join(NAMED_DRAFTS)}")
    if draft is None or isinstance(draft, str):
        return
    if isinstance(draft, type) or not isinstance(draft, LanguageModel | Drafter | Draft):
        raise ValueError(
            f"draft must be a model, as load_model gives it, a Drafter or a Draft, got {type(draft).__name__}"
        )
    model = draft if isinstance(draft, LanguageModel) and not isinstance(draft, Drafter) else None
    model = draft.model if isinstance(draft, Draft) else model
    if model is not None and model.device != target.device:
        raise ValueError(f"draft and target are on two devices, {model.device} and {target.device}; use one")
    check_same_vocabulary(known_vocabulary(target), known_vocabulary(draft))


def check_generation(
    target: object,
    rows: int,
    *,
    lookahead: int | str,
    max_new_tokens: int,
    sampling: SamplingParams | Sequence[SamplingParams],
    acceptance: str,
    stop_strings: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    on_token: object = None,
    on_commit: object = None,
    on_prefill: object = None,
    logits_processor: object = None,
    logprobs: object = None,
    cache: object = None,
) -> None:
    """The other arguments of ``generate``.

    Raises:
        ValueError: the first that is out of range.
    """
    if lookahead != "auto" and not (is_int(lookahead) and 1 <= lookahead <= MAX_LOOKAHEAD):
        raise ValueError(
            f"lookahead (K) must be auto or a whole number from 1 to {MAX_LOOKAHEAD}, got {shown(lookahead)}"
        )
    if not is_int(max_new_tokens) or not 0 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise ValueError(
            f"max_new_tokens must be a whole number from 0 to {MAX_NEW_TOKENS}, got {shown(max_new_tokens)}"
        )
    of_rows(sampling, rows)
    if acceptance not in ACCEPTANCES:
        raise ValueError(f"unknown acceptance {shown(acceptance)}; choose from: {', '.join(ACCEPTANCES)}")
    if not _all_of(stop_token_ids, is_int):
        raise ValueError(f"stop_token_ids must be a list of token ids, got {shown(stop_token_ids)}")
    outside = [token for token in stop_token_ids if not 0 <= token < target.vocab_size]
    if outside:
        raise ValueError(f"stop_token_ids must be token ids from 0 to {target.vocab_size - 1}, got {shown(outside[0])}")
    if not _all_of(stop_strings, lambda stop: isinstance(stop, str) and stop):
        raise ValueError(f"stop_strings must be a list of strings that are not empty, got {shown(stop_strings)}")
    for stop in stop_strings:
        if any("\ud800" <= character <= "\udfff" for character in stop):
            raise ValueError(f"stop_strings must be text, got {stop!r} with half of a surrogate pair")
    if stop_strings and tokenizer_of(target) is None:
        raise ValueError("stop_strings need the target's tokenizer, and it has none; use stop_token_ids instead")
    callbacks = {
        "on_token": on_token, "on_commit": on_commit, "on_prefill": on_prefill, "logits_processor": logits_processor,
    }  # fmt: skip
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise ValueError(f"{name} must be a function, got {type(callback).__name__}")
    if logprobs is not None and not (is_int(logprobs) and 0 <= logprobs <= MAX_LOGPROBS):
        raise ValueError(f"logprobs must be None or from 0 to {MAX_LOGPROBS}, got {shown(logprobs)}")
    if cache is not None and not isinstance(cache, GenerationCache):
        raise ValueError(f"cache must be a GenerationCache, got {type(cache).__name__}")


def end_of_text(target: LanguageModel) -> list[int]:
    """The tokens of a model that end a text, unless the caller names others."""
    eos = target.eos_token_id if isinstance(target.eos_token_id, tuple) else (target.eos_token_id,)
    return [token for token in eos if token is not None and token < target.vocab_size]


def _all_of(values: object, test: Callable[[object], object]) -> bool:
    """Whether ``values`` is a collection of which every member passes."""
    return isinstance(values, Collection) and not isinstance(values, str) and all(map(test, values))
