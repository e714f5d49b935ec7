"""The command line: text to stdout, everything else to stderr."""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

if __name__ == "__main__":  # streams and signals are set before anything that takes long is imported
    from speculative_mamba.run import main as run

    sys.exit(run())

import torch

from . import __version__
from .compare import compare
from .decode import GenerationResult, GraphExecutor, SamplingParams, generate
from .decode.inputs import ACCEPTANCES, MAX_NEW_TOKENS, NAMED_DRAFTS, check_generation, check_models
from .info import describe
from .models import MambaLM, load_model, load_pair
from .models.language_model import ROLLBACKS
from .models.text import TextStream
from .models.tokenizer import added_around, encode, text_tokenizer
from .ops.sampling_params import GREEDY_BELOW
from .ops.threads import available_cpus, num_threads, set_num_threads
from .streams import FAILURE, PROGRAM, OutputError, check_output, exit_code, one_line, say, signs_of_life, write

PROMPT = '"You are very kind," said'
MAX_THREADS = 1024
_SAMPLING = tuple(field for field in dataclasses.fields(SamplingParams) if field.name != "logit_bias")  # are options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(FAILURE, f"{self.prog}: error: {one_line(message)} (--help lists the options)\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        if action.nargs is None and arg_strings == ["--"]:  # a value like any other, which argparse would drop
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def _print_message(self, message: str, file: object = None) -> None:
        if message and file is sys.stdout:
            write(message)
        else:
            super()._print_message(message, file)


def _value(parse: Callable[[str], object], what: str) -> Callable[[str], object]:
    """A type of argparse: ``parse`` raises ValueError for what is not ``what``."""

    def read(value: str) -> object:
        try:
            return parse(value)
        except ValueError:
            shown = value if len(value) <= 40 else f"{value[:40]}…"
            raise argparse.ArgumentTypeError(f"must be {what}, got {shown!r}") from None

    return read


def _integer(lo: int, limit: int) -> Callable[[str], object]:
    def parse(value: str) -> int:
        if not lo <= int(value) <= limit:
            raise ValueError
        return int(value)

    return _value(parse, f"a whole number from {lo} to {limit}")


_WHOLE, _NUMBER = _value(int, "a whole number"), _value(float, "a number")
_LOOKAHEAD = _value(lambda value: value if value == "auto" else int(value), "auto or a whole number")
_TEXT = _value(lambda value: os.fsencode(value).decode(), "valid UTF-8")  # whatever the locale took it for


def _stop(value: str) -> str:
    text = _TEXT(value)
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Generates text with a Mamba target model, sped up by a draft model without changing the output. "
        "With no options it runs the embedded byte-level pair. 'speculative-mamba info' describes the installation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def option(name: str, **settings: object) -> None:
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))  # both spellings
        parser.add_argument(*names, **settings)

    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    option("prompt", type=_TEXT, default=PROMPT, help="text to continue")
    option(
        "n_tokens_to_generate", type=_integer(0, MAX_NEW_TOKENS), default=64, metavar="N",
        help="tokens to generate at most",
    )  # fmt: skip
    option("K", type=_LOOKAHEAD, default=4, help="tokens drafted per round, 1 to 15, or auto")
    option(
        "model_target", default="builtin:target", metavar="MODEL", help="folder, GGUF file, hub id or builtin:target"
    )
    option("model_draft", default="builtin:draft", metavar="MODEL", help="folder, GGUF file, hub id or builtin:draft")
    option("revision", help="branch, tag or commit of a hub id (default: the newest)", default=argparse.SUPPRESS)
    option("revision_draft", help="the same for the draft", default=argparse.SUPPRESS)
    option("chat", action="store_true", help="the prompt is a user's message, written by the model's chat template")
    option("system", type=_TEXT, metavar="TEXT", help="system message before it", default=argparse.SUPPRESS)
    option(
        "draft", choices=("model", *NAMED_DRAFTS, "none"), default=argparse.SUPPRESS,
        help="who drafts: model_draft, or the text so far without a model; none is plain decoding (default: model, but "
        "ngram for a target that comes without a model_draft)",
    )  # fmt: skip
    option(
        "dtype", help="float32, bfloat16, float16, q8_0 or q4_0 weights (default: as stored)", default=argparse.SUPPRESS
    )
    option("state_dtype", default="float32", help="float32, bfloat16 or float16 for the recurrent state")
    option(
        "rollback",
        choices=ROLLBACKS,
        default="auto",
        help="how to go back: snapshots of the state, or replay of the inputs",
    )
    option("device", default="cpu", help="cpu or cuda")
    option("backend", default="auto", help="auto, cpu (C++), cuda (CUDA C++), triton or reference (PyTorch)")
    option("no_mmap", action="store_true", help="copy the weights into memory, so that their files may change")
    option(
        "threads",
        type=_integer(1, MAX_THREADS),
        help="threads to use (default: one per core)",
        default=argparse.SUPPRESS,
    )
    option("temperature", type=_NUMBER, default=0.0, help="0 is greedy")
    option("top_k", type=_WHOLE, default=0, help="keep the k likeliest tokens; 0 keeps all")
    option("top_p", type=_NUMBER, default=1.0, help="keep the smallest set of tokens with this probability")
    option("min_p", type=_NUMBER, default=0.0, help="keep tokens of at least p times the largest probability")
    option("repetition_penalty", type=_NUMBER, default=1.0, help="above 1, tokens of the text become less likely")
    option("presence_penalty", type=_NUMBER, default=0.0, help="-2 to 2: off the logits of tokens generated before")
    option("frequency_penalty", type=_NUMBER, default=0.0, help="-2 to 2: the same for each time they were generated")
    option(
        "default_sampling", action="store_true",
        help="take what the model's generation_config.json recommends, but for options that are given",
    )  # fmt: skip
    option("acceptance", choices=ACCEPTANCES, default="rejection", help="coupled: the text of plain sampling, exactly")
    option("seed", type=_WHOLE, default=0, help="seed for sampling")
    option("stop", type=_stop, action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    option("no_special_tokens", action="store_true", help="encode the prompt as it is, without a BOS before it")
    option("no_skip_special_tokens", action="store_true", help="print special tokens of the new text too")
    option("cg", action="store_true", help="run every round as one CUDA graph, two ahead of the host")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for bad input (one line on stderr), 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        check_output()
        if arguments[:1] == ["info"]:
            _Parser(prog=f"{PROGRAM} info", description="Describes the installation.").parse_args(arguments[1:])
            write(describe() + "\n")
            return 0
        return _run(*_parse(arguments))
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return FAILURE
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = (str(error).splitlines() or ["out of memory."])[0]
        say(f"error: {reason} Try a smaller --dtype, --rollback replay or fewer tokens.")
        return FAILURE
    except KeyboardInterrupt as interrupt:
        return exit_code(interrupt)
    except OutputError as error:
        if not str(error):
            return 0
        say(f"error: {error}")
        return FAILURE


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, set[str]]:
    """The options, and the names of those that were given."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    unset = argparse.Namespace(**dict.fromkeys(vars(options)))
    given = {name for name, value in vars(parser.parse_args(arguments, unset)).items() if value is not None}
    if "draft" not in given:
        named = "model_draft" in given or options.model_target.startswith("builtin:")
        options.draft = "model" if named else "ngram"
    if options.compare and options.draft == "none":
        parser.error("--compare sets plain decoding against a draft, and --draft none has none")
    return options, given


@dataclass(frozen=True)
class _Idle:
    """Options that do nothing in some runs."""

    names: tuple[str, ...]
    when: Callable[[argparse.Namespace, SamplingParams], bool]
    why: str


_IDLE = (
    _Idle(("top_k",), lambda o, s: s.temperature <= GREEDY_BELOW, "temperature 0 takes the likeliest token"),
    _Idle(("top_p", "min_p", "seed"), lambda o, s: s.greedy, "greedy decoding draws nothing"),
    _Idle(("acceptance",), lambda o, s: s.greedy, "greedy text needs no choice of test"),
    _Idle(("acceptance",), lambda o, s: not s.greedy and o.draft == "none", "without a draft nothing is tested"),
    _Idle(("temperature",), lambda o, s: s.top_k == 1 and s.temperature > GREEDY_BELOW, "top_k 1 is greedy"),
    _Idle(("model_draft", "revision_draft"), lambda o, s: o.draft != "model", "another --draft was asked for"),
    _Idle(("K",), lambda o, s: o.draft == "none", "without a draft nothing is drafted"),
    _Idle(("system",), lambda o, s: not o.chat, "without --chat there are no messages"),
    _Idle(("no_special_tokens",), lambda o, s: o.chat, "a chat template writes its own"),
    _Idle(("stream",), lambda o, s: o.json, "--json prints all at the end"),
)


def _notices(options: argparse.Namespace, given: set[str], sampling: SamplingParams) -> Iterator[str]:
    """What a user should know about the options, a line each."""
    for idle in _IDLE:
        for name in idle.names:
            if name in given and idle.when(options, sampling):
                yield f"--{name} has no effect: {idle.why}"
    if "draft" not in given and options.draft == "ngram":
        yield "no --model_draft was named, so the text so far is the draft (--draft ngram)"


def _run(options: argparse.Namespace, given: set[str]) -> int:
    sampling = SamplingParams(**{field.name: getattr(options, field.name) for field in _SAMPLING})
    set_num_threads(getattr(options, "threads", num_threads()))
    common = {
        "dtype": getattr(options, "dtype", None), "state_dtype": options.state_dtype,
        "rollback": options.rollback, "device": options.device, "backend": options.backend,
        "mmap": not options.no_mmap, "revision": getattr(options, "revision", None),
    }  # fmt: skip
    draft = options.draft if options.draft in NAMED_DRAFTS else None
    if options.draft == "model":
        with signs_of_life(lambda: f"loading {options.model_target} and {options.model_draft}"):
            revision_draft = getattr(options, "revision_draft", None)
            target, draft = load_pair(
                options.model_target, options.model_draft, revision_draft=revision_draft, **common
            )
    else:
        with signs_of_life(lambda: f"loading {options.model_target}"):
            target = load_model(options.model_target, **common)
    notices = []
    if options.default_sampling:
        sampling = target.default_sampling
        notices.append(_about_default(sampling))
        own = {field.name: getattr(options, field.name) for field in _SAMPLING if field.name in given}
        sampling = dataclasses.replace(sampling, **own)
    check_models(target, draft)
    check_generation(
        target, rows=1, lookahead=options.K, max_new_tokens=options.n_tokens_to_generate, sampling=sampling,
        acceptance=options.acceptance,
    )  # fmt: skip
    executor = GraphExecutor() if options.cg and target.device.type == "cuda" else "eager"
    if options.chat:
        prompt = target.chat_prompt(_messages(options))
    else:
        prompt, about_prompt = _encode(target, options.prompt, not options.no_special_tokens)
        notices += about_prompt
    if options.cg and executor == "eager":
        say(f"--cg: no CUDA graphs on device {target.device.type}; the text is the same without")
    cores = available_cpus()
    if "threads" in given and options.threads > cores:
        say(f"--threads {options.threads} is more than the {cores} cores that this process may use, and slower")

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
        for notice in (*notices, *_notices(options, given, sampling)):
            say(notice)
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


def _about_default(sampling: SamplingParams) -> str:
    stated = {field.name: getattr(sampling, field.name) for field in _SAMPLING}
    stated = [f"{field.name} {stated[field.name]:g}" for field in _SAMPLING if stated[field.name] != field.default]
    if not stated:
        return "--default_sampling has no effect: the model recommends none (generation_config.json)"
    return f"--default_sampling: {', '.join(stated)}"


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
