"""Checks what a caller hands to ``generate``."""

from collections.abc import Callable, Collection, Sequence

import torch

from ..ops.sampling_params import is_int
from .cache import GenerationCache
from .sampling import SamplingParams

ACCEPTANCES = ("rejection", "coupled")
NAMED_DRAFTS = ("ngram",)
MAX_LOOKAHEAD = 15
MAX_NEW_TOKENS = 2**31 - 1


def read_prompts(prompt_ids: torch.Tensor | Sequence[Sequence[int]], vocabulary: int) -> list[list[int]]:
    """Prompts as lists.

    Raises:
        ValueError: no rows, an empty row, or something other than token ids of the vocabulary.
    """
    if isinstance(prompt_ids, torch.Tensor):
        if prompt_ids.ndim != 2 or prompt_ids.is_floating_point() or prompt_ids.dtype == torch.bool:
            raise ValueError(
                f"prompt_ids must be a LongTensor (B, L), got {prompt_ids.dtype} of shape {tuple(prompt_ids.shape)}"
            )
        prompt_ids = prompt_ids.tolist()
    try:
        prompts = [list(row.tolist() if isinstance(row, torch.Tensor) else row) for row in prompt_ids]
    except TypeError:
        raise ValueError("prompt_ids must be a LongTensor (B, L) or a list of lists of token ids") from None
    if not prompts:
        raise ValueError("prompt_ids has no rows; give at least one prompt")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"the prompt of row {index} is empty; give at least one token")
        for token in prompt:
            if not is_int(token):
                raise ValueError(f"the prompt of row {index} holds {token!r}, which is no token id")
            if not 0 <= token < vocabulary:
                raise ValueError(f"token id {token} in row {index} is outside the vocabulary of {vocabulary} tokens")
    return [list(map(int, prompt)) for prompt in prompts]


def check_models(target: object, draft: object) -> None:
    """Target and draft of ``generate``.

    Raises:
        ValueError: one is no model, or they do not fit together.
    """
    if not all(hasattr(target, name) for name in ("vocab_size", "prefill", "verify")):
        raise ValueError(f"target must be a model, as load_model gives it, got {type(target).__name__}")
    if isinstance(draft, str) and draft not in NAMED_DRAFTS:
        raise ValueError(f"unknown draft {draft!r}; by name there is: {', '.join(NAMED_DRAFTS)}")
    if draft is None or isinstance(draft, str):
        return
    kinds = (("begin", "propose"), ("prefill", "verify"), ("prepare", "draft"))
    if not any(all(hasattr(draft, name) for name in ("vocab_size", *names)) for names in kinds):
        raise ValueError(f"draft must be a model, as load_model gives it, or a Drafter, got {type(draft).__name__}")
    if getattr(draft, "device", target.device) != target.device:
        raise ValueError(f"draft and target are on two devices, {draft.device} and {target.device}; use one")
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"draft and target have different vocabularies ({draft.vocab_size} and {target.vocab_size} tokens); "
            "a draft must be trained on the same tokens"
        )


def check_generation(
    target: object,
    rows: int,
    *,
    lookahead: int | str,
    max_new_tokens: int,
    sampling: SamplingParams | Sequence[SamplingParams],
    acceptance: str,
    stop_strings: Sequence[str],
    stop_token_ids: Sequence[int] = (),
    on_token: object = None,
    logits_processor: object = None,
    cache: object = None,
) -> None:
    """The other arguments of ``generate``.

    Raises:
        ValueError: the first that is out of range.
    """
    if lookahead != "auto" and not (is_int(lookahead) and 1 <= lookahead <= MAX_LOOKAHEAD):
        raise ValueError(f"lookahead (K) must be auto or a whole number from 1 to {MAX_LOOKAHEAD}, got {lookahead!r}")
    if not is_int(max_new_tokens) or not 0 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise ValueError(f"max_new_tokens must be a whole number from 0 to {MAX_NEW_TOKENS}, got {max_new_tokens!r}")
    check_sampling(sampling, rows)
    if acceptance not in ACCEPTANCES:
        raise ValueError(f"unknown acceptance {acceptance!r}; choose from: {', '.join(ACCEPTANCES)}")
    if not _all_of(stop_token_ids, is_int):
        raise ValueError(f"stop_token_ids must be a list of token ids, got {stop_token_ids!r}")
    if not _all_of(stop_strings, lambda stop: isinstance(stop, str) and stop):
        raise ValueError(f"stop_strings must be a list of strings that are not empty, got {stop_strings!r}")
    if stop_strings and getattr(target, "tokenizer", None) is None:
        raise ValueError("stop_strings need the target's tokenizer, and it has none; use stop_token_ids instead")
    for name, callback in (("on_token", on_token), ("logits_processor", logits_processor)):
        if callback is not None and not callable(callback):
            raise ValueError(f"{name} must be a function, got {type(callback).__name__}")
    if cache is not None and not isinstance(cache, GenerationCache):
        raise ValueError(f"cache must be a GenerationCache, got {type(cache).__name__}")


def check_sampling(sampling: object, rows: int) -> None:
    """One ``SamplingParams``, or a list of one per row, of which each has one seed.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(sampling, SamplingParams):
        if isinstance(sampling.seed, tuple) and len(sampling.seed) != rows:
            raise ValueError(f"there are {len(sampling.seed)} seeds for {rows} rows; give one seed, or one per row")
        return
    of_rows = isinstance(sampling, (list, tuple)) and len(sampling) > 0
    if not of_rows or not all(isinstance(params, SamplingParams) for params in sampling):
        raise ValueError(f"sampling must be SamplingParams, or a list of one per row; got {sampling!r}")
    if len(sampling) != rows:
        raise ValueError(f"there are {len(sampling)} sampling parameters for {rows} rows; give one, or one per row")
    for row, params in enumerate(sampling):
        if isinstance(params.seed, tuple):
            raise ValueError(f"in a list of sampling parameters each has one seed, got {params.seed!r} for row {row}")


def _all_of(values: object, test: Callable[[object], object]) -> bool:
    """Whether ``values`` is a collection of which every member passes."""
    return isinstance(values, Collection) and not isinstance(values, str) and all(map(test, values))
