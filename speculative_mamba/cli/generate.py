"""``speculative-mamba``: continues a prompt."""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import __version__
from ..compare import compare
from ..decode.inputs import MAX_NEW_TOKENS, check_generation
from ..decode.logprobs import MAX_LOGPROBS
from ..models import MambaLM
from ..models.tokenizer import added_around, encode, text_tokenizer
from ..streams import PROGRAM, exit_code, say, signs_of_life
from .chat import converse
from .options import (
    SAMPLING_IDLE,
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
from .session import Session, Text

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
    option("prompt", type=TEXT, default=PROMPT, help="text to continue; - reads it from stdin")
    option("prompt_file", metavar="FILE", help="read the text to continue from a file", default=argparse.SUPPRESS)
    option(
        "n_tokens_to_generate", type=integer(0, MAX_NEW_TOKENS), default=64, metavar="N",
        help="tokens to generate at most",
    )  # fmt: skip
    option(
        "chat", action="store_true",
        help="the prompt is a user's message, written by the model's chat template; without a prompt, a conversation",
    )  # fmt: skip
    option("system", type=TEXT, metavar="TEXT", help="system message before it", default=argparse.SUPPRESS)
    add_model_options(parser)
    add_sampling_options(parser)
    option("stop", type=_stop, action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    option("ignore_eos", action="store_true", help="go on behind the model's end of text")
    option("no_special_tokens", action="store_true", help="encode the prompt as it is, without a BOS before it")
    option("no_skip_special_tokens", action="store_true", help="print special tokens of the new text too")
    option("stream", action="store_true", help="print text as it is made")
    option(
        "logprobs", type=integer(0, MAX_LOGPROBS), metavar="N", default=None,
        help="also the log-probability of each token and of the N likeliest: on stderr, or with --json in the object",
    )  # fmt: skip
    option("compare", action="store_true", help="also decode plainly; print both speeds and compare the tokens")
    option("json", action="store_true", help="print one JSON object instead of text")
    return parser


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
    if "prompt" in given and "prompt_file" in given:
        parser.error("--prompt and --prompt_file are two prompts; give one")
    converses = options.chat and not given & {"prompt", "prompt_file"}
    if converses and options.compare:
        parser.error("--compare needs a --prompt; without one, --chat is a conversation")
    prompt = "" if converses else read_prompt(options)
    sampling, notes = stated_sampling(options), []
    target, draft = load_models(options)
    if options.default_sampling:
        sampling, note = recommended_sampling(options, given, target)
        notes.append(note)
    check_generation(
        target, rows=1, lookahead=options.K, max_new_tokens=options.n_tokens_to_generate, sampling=sampling,
        acceptance=options.acceptance,
    )  # fmt: skip
    notes += notices(options, given, sampling, (*SAMPLING_IDLE, *_IDLE))
    streams = (options.stream or converses) and not options.json
    session = Session(target, draft, sampling, executor_of(options, target), options, streams, notes)
    if converses:
        return converse(session, system_message(options))
    if options.chat:
        ids, shown = target.chat_prompt([*system_message(options), {"role": "user", "content": prompt}]), ""
    else:
        ids, about_prompt = _encode(target, prompt, not options.no_special_tokens)
        notes[:0], shown = about_prompt, prompt
    return _continue(session, ids, shown)


def _continue(session: Session, prompt: list[int], shown: str) -> int:
    """One text. shown: what is written before it."""
    text, more = session.new_text(prompt), {}
    session.run(text, shown)
    if session.options.compare and not text.interrupt:
        try:
            more["compare"] = _compare(session, text)
        except KeyboardInterrupt as interrupt:
            text.interrupt = interrupt
    session.finish(text, shown, **more)
    return exit_code(text.interrupt) if text.interrupt else 0


def system_message(options: argparse.Namespace) -> list[dict[str, str]]:
    """What a conversation begins with."""
    return [{"role": "system", "content": options.system}] if hasattr(options, "system") else []


def read_prompt(options: argparse.Namespace) -> str:
    """The text of ``--prompt``, of stdin, or of a file, without one line end behind it.

    Raises:
        ValueError: there is no such file, or what it holds is no text.
    """
    path = getattr(options, "prompt_file", None)
    if path is None and options.prompt != "-":
        return options.prompt
    try:
        data = sys.stdin.buffer.read() if path is None else Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the prompt from {path or 'stdin'}: {error.strerror}") from None
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt from {path or 'stdin'} is not valid UTF-8: byte {error.start}") from None


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


def _compare(session: Session, text: Text) -> dict:
    """Times plain and speculative decoding in turn; says and returns what came out."""
    shown, plain = text.result, None

    def speed(draft: MambaLM | str | None) -> float:
        nonlocal plain
        result = session.generate(text.prompt, draft)
        plain = result if draft is None else plain
        return result.stats.tokens_per_s or 0.0

    if not shown.stats.tested_per_position:  # the budget is less than two tokens
        say("a draft has no part in so few tokens, so there is nothing to compare")
        return {"tokens_equal": None, "plain_tokens_per_s": None, "ratio": None, "ratio_range": None, "pairs": 0}
    with signs_of_life(lambda: "comparing with plain decoding"):
        timed = compare(lambda: speed(None), lambda: speed(session.draft))
    # Under rejection sampling the distribution is equal, not the text.
    same_text = session.sampling.greedy or session.options.acceptance == "coupled"
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
