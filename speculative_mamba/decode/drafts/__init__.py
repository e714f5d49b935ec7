"""Who proposes tokens: drafts, and what a caller may give for one."""

import copy
from collections.abc import Callable

from ...models.language_model import MambaLM
from ...models.runner import LanguageModel
from .base import Draft, Proposal
from .model import ModelDrafter
from .ngram import NgramDrafter, NgramLookup, NgramSearch
from .python import Drafter, PythonDraft

__all__ = ["Draft", "Drafter", "ModelDrafter", "NgramDrafter", "Proposal", "as_draft"]


def as_draft(
    draft: LanguageModel | Drafter | Draft, target: LanguageModel, texts: Callable[[], list[list[int]]], captured: bool
) -> Draft:
    """What drafts for a caller's model, drafter or draft. texts: those of all rows, at the time of the call.

    captured: rounds will be captured, so what can be on the device is to be there.

    Raises:
        ValueError: rounds will be captured, and it is Python.
    """
    made = draft
    if isinstance(draft, NgramDrafter):
        own = copy.copy(draft)  # it may serve several calls at a time
        as_it_is = type(draft).propose is NgramDrafter.propose
        made = NgramSearch(draft, target.device) if captured and as_it_is else NgramLookup(own, texts)
    elif isinstance(draft, Drafter) and not isinstance(draft, MambaLM | Draft):
        made = PythonDraft(draft, texts)
    elif not isinstance(draft, Draft):
        made = ModelDrafter(draft)
    if captured and not made.capturable:
        name = type(draft).__name__
        raise ValueError(f"the drafter {name} is Python and cannot be in a CUDA graph; use executor='eager'")
    return made
