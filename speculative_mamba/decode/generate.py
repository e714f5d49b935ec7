"""The loop: draft, verify, accept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..models.language_model import MambaLM
from .accept import accept_greedy, accept_rejection
from .drafter import Drafter, LanguageModel, as_drafter
from .inputs import check_generation, read_prompts
from .sampling import SamplingParams, row_generators
from .stats import GenerationStats
from .text import TextStream


@dataclass
class GenerationResult:
    """sequences: one LongTensor per row, prompt included. logits: with ``output_logits``, per row (new tokens, V)
    float32, what each new token was chosen from. finish_reasons: per row "length", "eos" or "stop"."""

    sequences: list[torch.Tensor]
    finish_reasons: list[str]
    stats: GenerationStats
    logits: list[torch.Tensor] | None = None


@dataclass
class _Row:
    """One text in the making."""

    tokens: list[int]
    budget: int
    stream: TextStream | None
    logits: list[torch.Tensor] = field(default_factory=list)
    finish_reason: str | None = None

    def commit(self, token: int, stop_token_ids: frozenset[int]) -> None:
        self.tokens.append(token)
        self.budget -= 1
        if self.stream is not None:
            self.stream.push(token)
        if token in stop_token_ids:
            self.finish_reason = "eos"
        elif self.stream is not None and self.stream.stopped:
            self.finish_reason = "stop"
        elif self.budget == 0:
            self.finish_reason = "length"


@torch.no_grad()
def generate(
    target: MambaLM | LanguageModel,
    prompt_ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    draft: MambaLM | LanguageModel | Drafter | None = None,
    lookahead: int = 4,
    max_new_tokens: int = 64,
    sampling: SamplingParams | None = None,
    acceptance: str = "rejection",
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    on_token: Callable[[int, int], None] | None = None,
    output_logits: bool = False,
) -> GenerationResult:
    """Continues each prompt, with a draft faster and to the same effect as without.

    Greedy text and its logits are bit for bit those of plain greedy decoding of each row alone. Sampled text follows
    the same law as plain sampling.

    Args:
        target: the model whose text is wanted.
        prompt_ids: LongTensor (B, L), or a list of B lists of token ids, which may differ in length.
        draft: a smaller model with the same vocabulary, or any ``Drafter``; None decodes plainly.
        lookahead: K, tokens drafted per round, 1 to 15.
        max_new_tokens: budget per row; exactly so many tokens unless a stop comes first. 0 gives the prompts back.
        sampling: defaults to greedy.
        acceptance: ``"rejection"`` (Leviathan et al. 2023, arXiv 2211.17192); greedy decoding needs no choice.
        stop_token_ids: a row ends with the first of these; None means the model's end-of-text token.
        stop_strings: a row ends with the token that completes one; needs ``target.tokenizer``.
        on_token: called as ``on_token(row, token)`` for every committed token, in order.
        output_logits: also return the logits.

    Raises:
        ValueError: an argument is out of range, the vocabularies differ, or a model's logits are NaN.
    """
    prompts = read_prompts(prompt_ids, target.vocab_size)
    sampling = sampling or SamplingParams()
    if stop_token_ids is None:
        stop_token_ids = () if target.eos_token_id is None else (target.eos_token_id,)
    check_generation(target, draft, lookahead, max_new_tokens, acceptance, stop_strings)
    stops = frozenset(stop_token_ids)
    rows = [
        _Row(list(prompt), max_new_tokens, TextStream(target.tokenizer, stop_strings) if stop_strings else None)
        for prompt in prompts
    ]
    lookahead = 0 if draft is None else min(lookahead, max(max_new_tokens - 1, 0))
    stats = GenerationStats(sum(map(len, prompts)))
    stats.tested_per_position, stats.accepted_per_position = [0] * lookahead, [0] * lookahead
    if max_new_tokens == 0:
        for row in rows:
            row.finish_reason = "length"
        return _result(rows, stats, target.vocab_size, output_logits)

    started = time.perf_counter()
    generators = row_generators(sampling.seed, len(rows))
    cache = target.new_cache(len(rows), lookahead + 1)
    for index, prompt in enumerate(prompts):
        target.prefill(prompt[:-1], cache, index)
    drafter = as_drafter(draft) if lookahead else None
    if drafter is not None:
        drafter.begin(prompts, lookahead, sampling, generators)
    start_slot = torch.zeros(len(rows), dtype=torch.int32, device=target.device)
    stats.prefill_s = time.perf_counter() - started

    decoding = time.perf_counter()
    while active := [index for index, row in enumerate(rows) if row.finish_reason is None]:
        # The longest row sets the window; what a shorter one drafts past its budget is dropped when it commits.
        drafts = min(lookahead, max(rows[index].budget for index in active) - 1)
        window = torch.tensor([row.tokens[-1:] for row in rows], device=target.device)
        drafted, laws = window[:, :0], None
        began = time.perf_counter()
        if drafts:
            drafted, laws = drafter.propose([row.tokens for row in rows], start_slot, drafts)
            drafted = drafted.to(target.device)
            window = torch.cat([window, drafted], 1)
        proposed = time.perf_counter()
        logits = target.verify(window, cache, start_slot)
        verified = time.perf_counter()
        if sampling.greedy:
            accepted, following = accept_greedy(logits, drafted, active)
        else:
            accepted, following = accept_rejection(logits, drafted, laws, sampling, generators, active)
        start_slot = accepted
        stats.rounds += 1
        stats.draft_s += proposed - began
        stats.verify_s += verified - proposed
        _commit(rows, drafted, accepted, following, logits if output_logits else None, stops, on_token, stats)
        stats.decode_s = time.perf_counter() - decoding
    return _result(rows, stats, target.vocab_size, output_logits)


def _commit(
    rows: list[_Row],
    drafted: torch.Tensor,
    accepted: torch.Tensor,
    following: torch.Tensor,
    logits: torch.Tensor | None,
    stops: frozenset[int],
    on_token: Callable[[int, int], None] | None,
    stats: GenerationStats,
) -> None:
    """Appends each row's accepted tokens and the next one, up to a stop or the end of its budget."""
    for index, (row, tokens, agreed, last) in enumerate(
        zip(rows, drafted.tolist(), accepted.tolist(), following.tolist(), strict=True)
    ):
        if row.finish_reason is not None:
            continue
        committed = 0
        for token in [*tokens[:agreed], last]:
            row.commit(token, stops)
            if logits is not None:
                row.logits.append(logits[index, committed].clone())
            committed += 1
            if on_token is not None:
                on_token(index, token)
            if row.finish_reason is not None:
                break
        stats.count(len(tokens), agreed, committed)


def _result(rows: list[_Row], stats: GenerationStats, vocabulary: int, output_logits: bool) -> GenerationResult:
    logits = [torch.stack(row.logits) if row.logits else torch.empty(0, vocabulary) for row in rows]
    return GenerationResult(
        sequences=[torch.tensor(row.tokens) for row in rows],
        finish_reasons=[row.finish_reason or "length" for row in rows],
        stats=stats,
        logits=logits if output_logits else None,
    )
