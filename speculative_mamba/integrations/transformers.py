"""Speculative decoding in ``generate`` of transformers: ``model.generate(…, custom_generate=speculative_generate)``.

transformers prepares a call: it reads the configuration, expands and pads the prompts, and makes processors of logits
and criteria for stopping. Here tokens come from ``decode``, and everything else happens to them as it would there, step
by step: criteria, streamer, scores.
"""

import inspect
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from ..decode.call import Call
from ..decode.drafts import Draft, Drafter
from ..decode.executors import Executor
from ..models.checkpoint import from_transformers
from ..models.in_memory import check_model
from ..models.language_model import MambaLM
from ..ops.values import shown
from .transformers_processors import RowProcessors, sampling_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

LOOKAHEAD = 4
_UNSET_NUM_ASSISTANT_TOKENS = 20  # what transformers has where nobody said anything
# Fields of a GenerationConfig that mean nothing here, with the value that says nothing.
_UNSUPPORTED = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0, "length_penalty": 1, "early_stopping": False,
    "constraints": None, "force_words_ids": None, "penalty_alpha": 0, "dola_layers": None, "guidance_scale": 1,
    "watermarking_config": None, "low_memory": None, "prompt_lookup_num_tokens": None, "assistant_early_exit": None,
    "num_assistant_tokens_schedule": "constant", "assistant_ensemble_weight": None, "use_mtp": None,
    "speculation_type": None, "is_assistant": False, "output_attentions": False, "output_hidden_states": False,
    "cache_implementation": None, "cache_config": None, "max_cache_len": None, "prefill_chunk_size": None,
    "compile_config": None, "continuous_batching_config": None,
}  # fmt: skip
_INSTEAD = {"prompt_lookup_num_tokens": "draft='ngram'", "num_assistant_tokens_schedule": "lookahead='auto'"}
_CACHES = ("cache", "past_key_values", "cache_params")  # by their names in all versions
_KNOWN_ARGUMENTS = {"attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep", *_CACHES}

_taken_over: "weakref.WeakKeyDictionary[torch.nn.Module, MambaLM]" = weakref.WeakKeyDictionary()


def speculative_generate(
    model: "PreTrainedModel",
    input_ids: torch.Tensor,
    logits_processor: "LogitsProcessorList",
    stopping_criteria: "StoppingCriteriaList",
    generation_config: "GenerationConfig",
    draft: "PreTrainedModel | MambaLM | Drafter | Draft | str | None" = None,
    lookahead: int | str | None = None,
    acceptance: str = "rejection",
    seed: int | None = None,
    executor: Executor | str = "eager",
    streamer: Any = None,
    synced_gpus: bool = False,
    **model_kwargs: Any,
) -> Any:
    """For ``custom_generate``: ``model.generate(**inputs, custom_generate=speculative_generate, draft=draft)``.

    Greedy text is that of plain decoding, sampled text follows the same distribution. Both models are taken over as
    ``from_transformers`` does, once, and again when their weights have changed.

    Args:
        model: as transformers passes it, like all that has no other word here.
        input_ids: the prompts.
        logits_processor: others than temperature, top-k, top-p, min-p and the repetition penalty run in Python, for one
            row and position at a time: they must depend on their arguments alone.
        stopping_criteria: see the rows together, as ever.
        generation_config: a field without meaning here is refused by name.
        draft: a model of transformers or one that is loaded already, a ``Drafter``, a ``Draft`` or ``"ngram"``; None
            decodes plainly. ``assistant_model`` is read too, but with models that have a state transformers refuses it
            before it calls anybody.
        lookahead: as of ``generate``; None is ``num_assistant_tokens`` of the configuration where it was set, else 4.
        acceptance: as of ``generate``.
        seed: None is that of the configuration, if it has one, else drawn from PyTorch's global generator, which
            ``transformers.set_seed`` seeds.
        executor: as of ``generate``.
        streamer: as ``generate`` of transformers takes it. With several rows it gets a token of each row at a time.

    Returns what ``generate`` of transformers does, without caches, attentions and hidden states.

    Raises:
        ValueError: a field has no meaning here, an argument is unknown, or as ``from_transformers`` and ``generate``.
    """
    asked = _arguments_of_generate(sys._getframe(1))
    streamer = asked.get("streamer") if streamer is None else streamer
    try:
        if asked.get("assistant_model") is not None:
            if draft is not None:
                raise ValueError("draft and assistant_model are both given; one of them is enough")
            draft = asked["assistant_model"]
        if synced_gpus or asked.get("synced_gpus"):
            raise ValueError("synced_gpus has no meaning for speculative_generate")
        given = asked.get("kwargs", {})  # transformers makes a cache where none was given
        if any(given.get(name) is not None for name in _CACHES):
            raise ValueError("speculative_generate cannot go on from a cache of transformers; use sm.generate(cache=…)")
        _refuse_unsupported(generation_config, model_kwargs)
        prompts = _Prompts(input_ids, model_kwargs.get("attention_mask"))
        sampling, rest = sampling_of(
            logits_processor, bool(generation_config.do_sample), _seed(seed, generation_config), prompts.padding
        )
        call = Call.of(
            _model(model), input_ids, prompts.mask, None if draft is None else _model(draft), sampling=sampling,
            lookahead=_lookahead(lookahead, generation_config), acceptance=acceptance,
            max_new_tokens=_max_length(stopping_criteria, generation_config) - input_ids.shape[1],
            stop_token_ids=_eos_token_ids(stopping_criteria, model), stop_strings=(), logprobs=None,
            output_logits=bool(generation_config.return_dict_in_generate)
            and bool(generation_config.output_logits or generation_config.output_scores),
            logits_processor=RowProcessors(rest, input_ids, prompts.padding) if rest else None, cache=None,
            executor=executor,
        )  # fmt: skip
        steps = _Steps(call, input_ids, logits_processor, stopping_criteria, generation_config)
        with closing(call.steps()) as rounds:
            for tokens in steps.run(rounds):
                if streamer is not None:
                    streamer.put(tokens.cpu())
    finally:
        if streamer is not None:  # whoever waits for more text would wait for ever
            streamer.end()
    return steps.output()


class _Prompts:
    """padding: (B) int64, tokens before each row's text that are none; mask: (B, L) int64."""

    def __init__(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.mask = torch.ones_like(input_ids) if mask is None else mask.to(torch.int64)
        self.padding = self.mask.argmax(1)


class _Steps:
    """The loop of transformers, in which every row gets a token at a time."""

    def __init__(
        self,
        call: Call,
        input_ids: torch.Tensor,
        logits_processor: "LogitsProcessorList",
        stopping_criteria: "StoppingCriteriaList",
        generation_config: "GenerationConfig",
    ) -> None:
        self._call, self._processor, self._criteria = call, logits_processor, stopping_criteria
        self._config = config = generation_config
        self._length = input_ids.shape[1]
        pad = config._pad_token_tensor
        self._pad = 0 if pad is None else int(pad)
        room = input_ids.new_full((len(input_ids), call.max_new_tokens), self._pad)
        self._sequences = torch.cat([input_ids, room], 1)
        self._prompt_lengths = [len(prompt) for prompt in call.prompts]
        # transformers puts padding behind a row that has ended where there are end-of-text tokens, else more text.
        self._pads = any("eos_token_id" in vars(criterion) for criterion in stopping_criteria)
        self._done = 0  # steps
        detailed = config.return_dict_in_generate
        self._logits: list[torch.Tensor] | None = [] if detailed and config.output_logits else None
        self._scores: list[torch.Tensor] | None = [] if detailed and config.output_scores else None

    def run(self, rounds: Iterator[None]) -> Iterator[torch.Tensor]:
        """The next token of every row (B), step by step, until all rows have been told to stop."""
        unfinished = torch.ones(len(self._sequences), dtype=torch.bool, device=self._sequences.device)
        for _ in rounds:
            for tokens in self._fresh():
                self._record_logits()
                at = self._length + self._done
                next_tokens = torch.tensor(tokens, device=unfinished.device)
                if self._pads:
                    next_tokens = torch.where(unfinished, next_tokens, self._pad)
                self._sequences[:, at] = next_tokens
                self._done += 1
                scores = None if self._scores is None else tuple(self._scores)
                unfinished &= ~self._criteria(self._sequences[:, : at + 1], scores)
                yield next_tokens
                if not unfinished.any():
                    return

    def _fresh(self) -> Iterator[list[int]]:
        """Tokens of steps that no row has yet to come to; padding for those that have ended."""
        rows = self._call.batch.rows
        texts = [row.tokens[length:] for row, length in zip(rows, self._prompt_lengths, strict=True)]
        reached = [len(text) for row, text in zip(rows, texts, strict=True) if row.finish_reason is None]
        for step in range(self._done, min(reached, default=max(map(len, texts)))):
            yield [text[step] if step < len(text) else self._pad for text in texts]

    def _record_logits(self) -> None:
        """What a row would have said behind its end is 0."""
        if self._logits is None and self._scores is None:
            return
        none = torch.zeros_like(self._call.batch.rows[0].logits[0][0])
        logits = torch.stack([_nth(row.logits, self._done, none) for row in self._call.batch.rows])
        if self._scores is not None:
            before = self._sequences[:, : self._length + self._done]
            self._scores.append(self._processor(before, logits.clone()))
        if self._logits is not None:
            self._logits.append(logits)

    def output(self) -> Any:
        sequences = self._sequences[:, : self._length + self._done]
        if not self._config.return_dict_in_generate:
            return sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        scores, logits = (None if part is None else tuple(part) for part in (self._scores, self._logits))
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)


def _arguments_of_generate(frame: Any) -> Mapping[str, Any]:
    """What ``generate`` of transformers was called with, if this is its frame. Where ``custom_generate`` is a function
    it keeps ``streamer``, ``assistant_model`` and ``synced_gpus`` to itself."""
    from transformers import GenerationMixin

    return frame.f_locals if frame.f_code is inspect.unwrap(GenerationMixin.generate).__code__ else {}


def _model(model: object) -> object:
    """A model of transformers as one of ours; anything else as it is."""
    if not isinstance(model, torch.nn.Module):
        return model
    check_model(model)
    known = _taken_over.get(model)
    if known is None or known.files[0].changed:
        known = _taken_over[model] = from_transformers(model)
    return known


def _refuse_unsupported(config: "GenerationConfig", arguments: Mapping[str, Any]) -> None:
    for name, neutral in _UNSUPPORTED.items():
        value = vars(config).get(name, neutral)
        if value is not None and value != neutral:
            instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise ValueError(f"{name} = {shown(value)} has no meaning for speculative_generate{instead}")
    for name, value in arguments.items():
        if name not in _KNOWN_ARGUMENTS and value is not None:
            raise ValueError(f"{name} has no meaning for speculative_generate")


def _seed(seed: object, config: "GenerationConfig") -> object:
    seed = vars(config).get("seed") if seed is None else seed
    if seed is not None or not config.do_sample:
        return 0 if seed is None else seed
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def _lookahead(lookahead: object, config: "GenerationConfig") -> object:
    stated = vars(config).get("num_assistant_tokens")
    if lookahead is not None:
        return lookahead
    return LOOKAHEAD if stated in (None, _UNSET_NUM_ASSISTANT_TOKENS) else stated


def _max_length(criteria: "StoppingCriteriaList", config: "GenerationConfig") -> int:
    from transformers import MaxLengthCriteria

    return min((one.max_length for one in criteria if type(one) is MaxLengthCriteria), default=config.max_length)


def _eos_token_ids(criteria: "StoppingCriteriaList", model: "PreTrainedModel") -> list[int]:
    from transformers import EosTokenCriteria

    ids = [token for one in criteria if type(one) is EosTokenCriteria for token in one.eos_token_id.tolist()]
    return [token for token in dict.fromkeys(ids) if 0 <= token < model.config.vocab_size]


def _nth(parts: Iterable[torch.Tensor], n: int, default: torch.Tensor) -> torch.Tensor:
    """Element ``n`` of parts one after the other."""
    for part in parts:
        if n < len(part):
            return part[n]
        n -= len(part)
    return default
