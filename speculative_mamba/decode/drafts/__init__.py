"""Who proposes tokens: drafts, and what a caller may give for one."""

import copy
from collections.abc import Callable

from ...models.language_model import MambaLM
from .base import Draft, LanguageModel, Proposal
from .model import ModelDrafter
from .ngram import NgramDrafter, NgramSearch
from .python import Drafter, PythonDraft

__all__ = ["Draft", "Drafter", "LanguageModel", "ModelDrafter", "NgramDrafter", "Proposal", "PythonDraft", "as_draft"]


def as_draft(draft: object, target: LanguageModel, texts: Callable[[], list[list[int]]], captured: bool) -> Draft:
    """What drafts for a caller's model, drafter or draft. texts: those of all rows, at the time of the call.

    captured: rounds will be captured, so what can be on the device is to be there.
    """
    if isinstance(draft, Draft):
        return draft
    if isinstance(draft, NgramDrafter) and type(draft).propose is NgramDrafter.propose:
        if captured:
            return NgramSearch(draft, target.device)
        draft = copy.copy(draft)  # it may serve several calls at a time
    if isinstance(draft, Drafter) and not isinstance(draft, MambaLM):
        return PythonDraft(draft, target.vocab_size, texts)
    return ModelDrafter(draft)
