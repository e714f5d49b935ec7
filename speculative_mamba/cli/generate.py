"""``speculative-mamba``: continues a prompt."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .. import __version__
from ..compare import compare
from ..decode import GenerationResult, generate
from ..decode.inputs import MAX_NEW_TOKENS, check_generation
from ..models import MambaLM
from ..models.text import TextStream
from ..models.tokenizer import added_around, encode, text_tokenizer
from ..ops.threads import num_threads
from ..streams import PROGRAM, exit_code, say, signs_of_life, write
from .options import (
    TEXT,
    Idle,
    Parser,
    add_model_options,
    add_sampling_options,
    choose_draft,
    executor_of,
    integer,
    load_models,
    notices,
    recommended_sampling,
    stated_sampling,
)

PROMPT = '"You are very kind," said'


def _stop(value: str) -> str:
    text = TEXT(value)
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Generates text with a Mamba target model, sped up by a draft model without changing the output. "
        "With no options it runs the embedded byte-level pair. 'speculative-mamba info' describes the installation.",
    )
    option = parser.option
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    option("prompt", type=TEXT, default=PROMPT, help="text to continue")
    option(
        "n_tokens_to_generate", type=integer(0, MAX_NEW_TOKENS), default=64, metavar="N",
        help="tokens to generate at most",
    )  # fmt: skip
    option("chat", action="store_true", help="the prompt is a user's message, written by the model's chat template")
    option("system", type=TEXT, metavar="TEXT", help="system message before it", default=argparse.SUPPRESS)
    add_model_options(parser)
    add_sampling_options(parser)
    option("stop", type=_stop, action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    option("no_special_tokens", action="store_true", help="encode the prompt as it is, without a BOS before it")
    option("no_skip_special_tokens", action="store_true", help="print special tokens of the new text too")
    option("stream", action="store_true", help="print text as it is made")
    option("compare", action="store_true", help="also decode plainly; print both speeds and compare the tokens")
    option("json", action="store_true", help="print one JSON object instead of text")
    return parser


@dataclass
class _Output:
    """Collects one run's tokens and text, and shows the text as it grows if asked to."""

    stream: TextStream
    show: Callable[[str], None] | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""

    def on_token(self, row: int, token: int) -> None:
        self.tokens.append(token)
        self._add(self.stream.push(token))

    def progress(self, prompt_tokens: int, budget: int) -> str | None:
        """What is going on, where it cannot be seen."""
        if not self.tokens:
            return f"reading {prompt_tokens} prompt tokens"
        return None if self.show else f"generating, {len(self.tokens)} of {budget} tokens"

    def finish(self) -> None:
        self._add(self.stream.finish())

    def _add(self, piece: str) -> None:
        self.text += piece
        if piece and self.show is not None:
            self.show(piece)


_IDLE = (
    Idle(("system",), lambda o, s: not o.chat, "without --chat there are no messages"),
    Idle(("no_special_tokens",), lambda o, s: o.chat, "a chat template writes its own"),
    Idle(("stream",), lambda o, s: o.json, "--json prints all at the end"),
)


def run(arguments: list[str]) -> int:
    parser = build_parser()
    options, given = parser.read(arguments)
    choose_draft(options, given)
    if options.compare and options.draft == "none":
        parser.error("--compare sets plain decoding against a draft, and --draft none has none")
    sampling = stated_sampling(options)
    target, draft = load_models(options)
    notes = []
    if options.default_sampling:
        sampling, note = recommended_sampling(options, given, target)
        notes.append(note)
    check_generation(
        target, rows=1, lookahead=options.K, max_new_tokens=options.n_tokens_to_generate, sampling=sampling,
        acceptance=options.acceptance,
    )  # fmt: skip
    executor = executor_of(options, target)
    if options.chat:
        prompt = target.chat_prompt(_messages(options))
    else:
        prompt, about_prompt = _encode(target, options.prompt, not options.no_special_tokens)
        notes += about_prompt
    notes += notices(options, given, sampling, _IDLE)

    def once(draft: MambaLM | str | None, output: _Output | None = None) -> GenerationResult:
        return generate(
            target, [prompt], draft=draft, lookahead=options.K, max_new_tokens=options.n_tokens_to_generate,
            sampling=sampling, acceptance=options.acceptance, stop_strings=options.stop,
            on_token=output.on_token if output else None, executor=executor,
        )  # fmt: skip

    show = write if options.stream and not options.json else None
    skip = not options.no_skip_special_tokens
    output = _Output(TextStream(target.tokenizer, options.stop, prompt, skip_special_tokens=skip), show)
    shown_prompt = "" if options.chat else options.prompt
    if show:
        show(shown_prompt)
    result, comparison, code = None, None, 0
    try:
        with signs_of_life(lambda: output.progress(len(prompt), options.n_tokens_to_generate)):
            result = once(draft, output)
        _report(target, draft, result)
        for note in notes:
            say(note)
        if options.compare:
            comparison = _compare(once, draft, result, sampling.greedy or options.acceptance == "coupled")
    except KeyboardInterrupt as interrupt:
        say(f"interrupted after {len(output.tokens)} tokens")
        code = exit_code(interrupt)
    output.finish()
    if options.json:
        report = {"prompt_tokens": prompt, "tokens": output.tokens, "text": output.text}
        report["stats"] = result.stats.as_dict() if result else None
        if comparison is not None:
            report["compare"] = comparison
        write(json.dumps(report) + "\n")
    else:
        write("\n" if show else f"{shown_prompt}{output.text}\n")
    return code


def _messages(options: argparse.Namespace) -> list[dict[str, str]]:
    """The conversation of ``--chat``."""
    messages = [{"role": "user", "content": options.prompt}]
    return [{"role": "system", "content": options.system}, *messages] if hasattr(options, "system") else messages


def _encode(target: MambaLM, prompt: str, special_tokens: bool) -> tuple[list[int], list[str]]:
    """The prompt's token ids, and what a user should know about them."""
    tokenizer = text_tokenizer(target)
    ids = encode(tokenizer, prompt, special_tokens)
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    before, behind = (("".join(map(tokenizer.id_to_token, tokens)), tokens) for tokens in added_around(tokenizer))
    return ids, list(_about_prompt(ids, special_tokens, before, behind))


def _about_prompt(
    ids: list[int], special_tokens: bool, before: tuple[str, list[int]], behind: tuple[str, list[int]]
) -> Iterator[str]:
    """before, behind: what the tokenizer adds, as text and as ids."""
    (text_before, ids_before), (text_behind, ids_behind) = before, behind
    count = len(ids_before)
    if not special_tokens:
        if not ids_before and not ids_behind:
            yield "--no_special_tokens has no effect: the tokenizer adds none"
        return
    if count and ids[count : 2 * count] == ids_before:
        yield f"the prompt begins with {text_before}, and the tokenizer adds it once more; see --no_special_tokens"
    if ids_behind:
        yield f"the tokenizer adds {text_behind} behind the prompt, which may end the text; see --no_special_tokens"


def _report(target: MambaLM, draft: MambaLM | str | None, result: GenerationResult) -> None:
    stats = result.stats
    names = target.name if draft is None else f"{target.name} with draft {getattr(draft, 'name', draft)}"
    say(f"{names}, backend {target.backend}, {num_threads()} threads")
    if not stats.tokens:
        return
    line = f"{stats.tokens} tokens in {stats.decode_s:.3f} s: {stats.tokens_per_s:.1f} tokens/s"
    line += f" after {stats.prefill_s:.3f} s for {stats.prompt_tokens} prompt tokens"
    if stats.tested:
        line += f"; acceptance rate {stats.acceptance_rate:.2f} ({stats.accepted} of {stats.tested} tested)"
        line += f", {stats.tokens_per_round:.2f} tokens per round"
    say(line)
    if stats.draft_dropped_at is not None:
        say(f"--K auto: the draft did not pay, so after {stats.draft_dropped_at} rounds it was left out")


def _compare(
    once: Callable[[MambaLM | str | None], GenerationResult],
    draft: MambaLM | str | None,
    shown: GenerationResult,
    same_text: bool,
) -> dict:
    """Times plain and speculative decoding in turn; says and returns what came out."""
    plain = None

    def speed(draft: MambaLM | str | None) -> float:
        nonlocal plain
        result = once(draft)
        plain = result if draft is None else plain
        return result.stats.tokens_per_s or 0.0

    if not shown.stats.tested_per_position:  # the budget is less than two tokens
        say("a draft has no part in so few tokens, so there is nothing to compare")
        return {"tokens_equal": None, "plain_tokens_per_s": None, "ratio": None, "ratio_range": None, "pairs": 0}
    with signs_of_life(lambda: "comparing with plain decoding"):
        timed = compare(lambda: speed(None), lambda: speed(draft))
    # Under rejection sampling the distribution is equal, not the text.
    equal = torch.equal(plain.sequences[0], shown.sequences[0]) if same_text else None
    said = {
        True: "the tokens are equal",
        False: "THE TOKENS DIFFER",
        None: "sampled: equal in distribution, not in text",
    }
    plain_speed, ratio, ratios = statistics.median(timed.plain), statistics.median(timed.ratios), sorted(timed.ratios)
    say(
        f"plain {plain_speed:.1f} tokens/s, with draft {statistics.median(timed.drafted):.1f} tokens/s, "
        f"ratio {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} pairs of runs); {said[equal]}"
    )
    return {
        "tokens_equal": equal, "plain_tokens_per_s": plain_speed, "ratio": ratio,
        "ratio_range": [ratios[0], ratios[-1]], "pairs": len(ratios),
    }  # fmt: skip
