"""What the texts of a run are generated with, and a text as it grows."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..decode import CommittedToken, GenerationCache, GenerationResult, SamplingParams, generate
from ..decode.executors import Executor
from ..models import MambaLM
from ..models.text import TextStream
from ..ops.threads import num_threads
from ..serve.token_text import TokenText
from ..streams import coloured, say, shows_colours, signs_of_life, write
from .logprobs import logprobs_report, table


@dataclass
class Text:
    """New text behind a prompt, and what became of the run that made it.

    drafted: whether the draft gave the last token. result: None while it is generated. interrupt: came before the end.
    """

    prompt: list[int]
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    drafted: bool = False
    text: str = ""
    result: GenerationResult | None = None
    interrupt: KeyboardInterrupt | None = None

    def push(self, committed: CommittedToken) -> str:
        """Takes a token; the text that is complete with it."""
        self.tokens.append(committed.token)
        self.drafted = committed.drafted
        return self._add(self.stream.push(committed.token))

    def finish(self) -> str:
        """What was held back."""
        return self._add(self.stream.finish())

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece


@dataclass
class Session:
    """Models and options. streams: texts are written as they grow. notes: lines to say with the first; None: said."""

    target: MambaLM
    draft: MambaLM | str | None
    sampling: SamplingParams
    executor: Executor
    options: argparse.Namespace
    streams: bool
    notes: list[str] | None

    def generate(self, prompt: Sequence[int], draft: MambaLM | str | None, **more: object) -> GenerationResult:
        options = self.options
        return generate(
            self.target, [prompt], draft=draft, lookahead=options.K, max_new_tokens=options.n_tokens_to_generate,
            sampling=self.sampling, acceptance=options.acceptance, stop_strings=options.stop,
            stop_token_ids=() if options.ignore_eos else None, logprobs=options.logprobs,
            executor=self.executor, **more,
        )  # fmt: skip

    def new_text(self, prompt: list[int]) -> Text:
        skip = not self.options.no_skip_special_tokens
        return Text(prompt, TextStream(self.target.tokenizer, self.options.stop, prompt, skip_special_tokens=skip))

    def run(self, text: Text, before: str, cache: GenerationCache | None = None) -> None:
        """Generates a text, and says how it went. A streamed one is written as it grows, behind ``before``."""
        budget, known = self.options.n_tokens_to_generate, cache.sequences[0] if cache and cache.sequences else ()
        to_read, read = len(text.prompt) - len(known), 0
        show = _Show(before) if self.streams else None

        def on_commit(committed: list[CommittedToken]) -> None:
            if show is not None:
                end_signs()
            for token in committed:
                piece = text.push(token)
                if show is not None:
                    show(piece, token.drafted)

        def describe() -> str:
            if text.tokens:
                return f"generating, {len(text.tokens)} of {budget} tokens"
            return f"reading {to_read} prompt tokens"

        def share() -> float | None:
            return len(text.tokens) / budget if text.tokens else read / to_read

        def on_prefill(count: int) -> None:
            nonlocal read
            read += count

        try:
            with signs_of_life(describe, share) as end_signs:
                text.result = self.generate(
                    text.prompt, self.draft, cache=cache, on_commit=on_commit, on_prefill=on_prefill
                )
        except KeyboardInterrupt as interrupt:
            text.interrupt = interrupt
        rest = text.finish()
        if show is not None:
            show(rest, text.drafted)
            write("\n")
        if text.interrupt is not None:
            say(f"interrupted after {len(text.tokens)} tokens")
        else:
            self._report(text)

    def finish(self, text: Text, before: str, **more: object) -> None:
        """Reports on a text, and writes it if it is not there yet; with ``--json`` an object, and ``more`` in it."""
        if text.result and self.options.logprobs is not None:
            more["logprobs"] = logprobs_report(text.tokens, text.result.logprobs[0], TokenText(self.target.tokenizer))
        if self.options.json:
            report = {"prompt_tokens": text.prompt, "tokens": text.tokens, "text": text.text}
            report["stats"] = text.result.stats.as_dict() if text.result else None
            write(json.dumps(report | more) + "\n")
            return
        if not self.streams:
            write(f"{before}{text.text}\n")
        for line in table(more.get("logprobs", ())):
            say(line)

    def _report(self, text: Text) -> None:
        """Says what the text was made with, how fast, and what there is to note about the options."""
        target, draft, stats = self.target, self.draft, text.result.stats
        if self.notes is not None:
            names = target.name if draft is None else f"{target.name} with draft {getattr(draft, 'name', draft)}"
            say(f"{names}, backend {target.backend}, {num_threads()} threads")
        if stats.tokens:
            line = f"{stats.tokens} tokens in {stats.decode_s:.3f} s: {stats.tokens_per_s:.1f} tokens/s"
            line += f" after {stats.prefill_s:.3f} s for {stats.prompt_tokens} prompt tokens"
            if stats.tested:
                line += f"; acceptance rate {stats.acceptance_rate:.2f} ({stats.accepted} of {stats.tested} tested)"
                line += f", {stats.tokens_per_round:.2f} tokens per round"
            say(line)
        if stats.draft_dropped_at is not None:
            say(f"--K auto: the draft did not pay, so after {stats.draft_dropped_at} rounds it was left out")
        for note in self.notes or ():
            say(note)
        self.notes = None


class _Show:
    """Writes a text piece by piece; those that the draft gave in colour, where stdout takes colours."""

    def __init__(self, before: str) -> None:
        self._before, self._colours = before, shows_colours()

    def __call__(self, piece: str, drafted: bool) -> None:
        shown = coloured(piece) if piece and drafted and self._colours else piece
        if self._before or shown:
            write(self._before + shown)
            self._before = ""
