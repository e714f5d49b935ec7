"""Options that several commands have, and what becomes of them: models, their draft, sampling parameters."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..decode import EagerExecutor, GraphExecutor, SamplingParams
from ..decode.executors import Executor
from ..decode.inputs import ACCEPTANCES, NAMED_DRAFTS, check_models
from ..models import MambaLM, load_model, load_pair
from ..models.language_model import ROLLBACKS
from ..ops.sampling_params import GREEDY_BELOW
from ..ops.threads import available_cpus, num_threads, set_num_threads
from ..streams import FAILURE, one_line, say, signs_of_life, write

MAX_THREADS = 1024
# Those that are options: all but logit_bias.
SAMPLING_FIELDS = tuple(field for field in dataclasses.fields(SamplingParams) if field.name != "logit_bias")


class Parser(argparse.ArgumentParser):
    """Bad input is one line on stderr and exit code 2; options have both spellings, no abbreviations."""

    def __init__(self, **settings: object) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **settings)

    def option(self, name: str, **settings: object) -> None:
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **settings)

    def read(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
        """The options, and the names of those that were given."""
        options = self.parse_args(arguments)
        unset = argparse.Namespace(**dict.fromkeys(vars(options)))
        return options, {name for name, value in vars(self.parse_args(arguments, unset)).items() if value is not None}

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


def value(parse: Callable[[str], object], what: str) -> Callable[[str], object]:
    """A type of argparse: ``parse`` raises ValueError for what is not ``what``."""

    def read(given: str) -> object:
        try:
            return parse(given)
        except ValueError:
            shown = given if len(given) <= 40 else f"{given[:40]}…"
            raise argparse.ArgumentTypeError(f"must be {what}, got {shown!r}") from None

    return read


def integer(lo: int, limit: int) -> Callable[[str], object]:
    """A type of argparse."""

    def parse(given: str) -> int:
        if not lo <= int(given) <= limit:
            raise ValueError
        return int(given)

    return value(parse, f"a whole number from {lo} to {limit}")


WHOLE, NUMBER = value(int, "a whole number"), value(float, "a number")
TEXT = value(lambda given: os.fsencode(given).decode(), "valid UTF-8")  # whatever the locale took it for
_LOOKAHEAD = value(lambda given: given if given == "auto" else int(given), "auto or a whole number")


def add_model_options(parser: Parser) -> None:
    """Target and draft, how they are loaded, and how they work together."""
    option = parser.option
    option(
        "model_target", default="builtin:target", metavar="MODEL", help="folder, GGUF file, hub id or builtin:target"
    )
    option("model_draft", default="builtin:draft", metavar="MODEL", help="folder, GGUF file, hub id or builtin:draft")
    option("revision", help="branch, tag or commit of a hub id (default: the newest)", default=argparse.SUPPRESS)
    option("revision_draft", help="the same for the draft", default=argparse.SUPPRESS)
    option(
        "draft", choices=("model", *NAMED_DRAFTS, "none"), default=argparse.SUPPRESS,
        help="who drafts: model_draft, or the text so far without a model; none is plain decoding (default: model, but "
        "ngram for a target that comes without a model_draft)",
    )  # fmt: skip
    option("K", type=_LOOKAHEAD, default=4, help="tokens drafted per round, 1 to 15, or auto")
    option("acceptance", choices=ACCEPTANCES, default="rejection", help="coupled: the text of plain sampling, exactly")
    option(
        "dtype", help="float32, bfloat16, float16, q8_0 or q4_0 weights (default: as stored)", default=argparse.SUPPRESS
    )
    option("state_dtype", default="float32", help="float32, bfloat16 or float16 for the recurrent state")
    option(
        "rollback", choices=ROLLBACKS, default="auto",
        help="how to go back: snapshots of the state, or replay of the inputs",
    )  # fmt: skip
    option("device", default="cpu", help="cpu or cuda")
    option("backend", default="auto", help="auto, cpu (C++), cuda (CUDA C++), triton or reference (PyTorch)")
    option("no_mmap", action="store_true", help="copy the weights into memory, so that their files may change")
    option(
        "threads", type=integer(1, MAX_THREADS), default=argparse.SUPPRESS,
        help="threads to use (default: one per core)",
    )  # fmt: skip
    option("cg", action="store_true", help="run every round as one CUDA graph, two ahead of the host")


def add_sampling_options(parser: Parser) -> None:
    option = parser.option
    option("temperature", type=NUMBER, default=0.0, help="0 is greedy")
    option("top_k", type=WHOLE, default=0, help="keep the k likeliest tokens; 0 keeps all")
    option("top_p", type=NUMBER, default=1.0, help="keep the smallest set of tokens with this probability")
    option("min_p", type=NUMBER, default=0.0, help="keep tokens of at least p times the largest probability")
    option("repetition_penalty", type=NUMBER, default=1.0, help="above 1, tokens of the text become less likely")
    option("presence_penalty", type=NUMBER, default=0.0, help="-2 to 2: off the logits of tokens generated before")
    option("frequency_penalty", type=NUMBER, default=0.0, help="-2 to 2: the same for each time they were generated")
    option("seed", type=WHOLE, default=0, help="seed for sampling")
    option(
        "default_sampling", action="store_true",
        help="take what the model's generation_config.json recommends, but for options that are given",
    )  # fmt: skip


def add_engine_options(parser: Parser) -> None:
    option = parser.option
    option("served_model_name", type=TEXT, metavar="NAME", help="what calls call the model (default: its own name)")
    option("max_batch_size", type=integer(1, 1024), default=8, metavar="N", help="texts to generate at once")
    option("max_length", type=integer(2, 2**31 - 1), default=8192, metavar="N", help="tokens of a prompt and its text")


def choose_draft(options: argparse.Namespace, given: set[str]) -> None:
    """Fills in ``options.draft`` where it was not given."""
    if "draft" not in given:
        named = "model_draft" in given or options.model_target.startswith("builtin:")
        options.draft = "model" if named else "ngram"


def load_models(options: argparse.Namespace) -> tuple[MambaLM, MambaLM | str | None]:
    """Target and draft, as ``generate`` takes them.

    Raises:
        ValueError: a model cannot be loaded, or they do not fit together.
    """
    set_num_threads(getattr(options, "threads", num_threads()))
    common = {
        "dtype": getattr(options, "dtype", None), "state_dtype": options.state_dtype,
        "rollback": options.rollback, "device": options.device, "backend": options.backend,
        "mmap": not options.no_mmap, "revision": getattr(options, "revision", None),
    }  # fmt: skip
    draft, loading = options.draft if options.draft in NAMED_DRAFTS else None, (options.model_target, None)

    def on_load(source: str, share: float) -> None:
        nonlocal loading
        loading = source, share

    with signs_of_life(lambda: f"loading {loading[0]}", lambda: loading[1]):
        if options.draft == "model":
            target, draft = load_pair(
                options.model_target, options.model_draft, revision_draft=getattr(options, "revision_draft", None),
                on_load=on_load, **common,
            )  # fmt: skip
        else:
            target = load_model(options.model_target, on_load=on_load, **common)
    check_models(target, draft)
    return target, draft


def executor_of(options: argparse.Namespace, target: MambaLM) -> Executor:
    """An executor for ``generate``; --cg where there are no graphs is said."""
    if options.cg and target.device.type != "cuda":
        say(f"--cg: no CUDA graphs on device {target.device.type}; the text is the same without")
    return GraphExecutor() if options.cg and target.device.type == "cuda" else EagerExecutor()


def stated_sampling(options: argparse.Namespace) -> SamplingParams:
    """
    Raises:
        ValueError: a parameter is out of range.
    """
    return SamplingParams(**{field.name: getattr(options, field.name) for field in SAMPLING_FIELDS})


def recommended_sampling(options: argparse.Namespace, given: set[str], target: MambaLM) -> tuple[SamplingParams, str]:
    """What ``--default_sampling`` makes of the options: the model's own, but for those that were given; and a line."""
    recommended = target.default_sampling
    values = ((field, getattr(recommended, field.name)) for field in SAMPLING_FIELDS)
    stated = [f"{field.name} {number:g}" for field, number in values if number != field.default]
    line = f"--default_sampling: {', '.join(stated)}"
    if not stated:
        line = "--default_sampling has no effect: the model recommends none (generation_config.json)"
    own = {field.name: getattr(options, field.name) for field in SAMPLING_FIELDS if field.name in given}
    return dataclasses.replace(recommended, **own), line


@dataclass(frozen=True)
class Idle:
    """Options that do nothing in some runs."""

    names: tuple[str, ...]
    when: Callable[[argparse.Namespace, SamplingParams], bool]
    why: str


SAMPLING_IDLE = (
    Idle(("top_k",), lambda o, s: s.temperature <= GREEDY_BELOW, "temperature 0 takes the likeliest token"),
    Idle(("top_p", "min_p", "seed"), lambda o, s: s.greedy, "greedy decoding draws nothing"),
    Idle(("acceptance",), lambda o, s: s.greedy, "greedy text needs no choice of test"),
    Idle(("acceptance",), lambda o, s: not s.greedy and o.draft == "none", "without a draft nothing is tested"),
    Idle(("temperature",), lambda o, s: s.top_k == 1 and s.temperature > GREEDY_BELOW, "top_k 1 is greedy"),
)
_DRAFT_IDLE = (
    Idle(("model_draft", "revision_draft"), lambda o, s: o.draft != "model", "another --draft was asked for"),
    Idle(("K",), lambda o, s: o.draft == "none", "without a draft nothing is drafted"),
)


def notices(
    options: argparse.Namespace, given: set[str], sampling: SamplingParams, rules: Sequence[Idle] = ()
) -> Iterator[str]:
    """What a user should know about the options, a line each. rules: on options beside those of models and drafts."""
    for idle in (*_DRAFT_IDLE, *rules):
        for name in idle.names:
            if name in given and idle.when(options, sampling):
                yield f"--{name} has no effect: {idle.why}"
    if "draft" not in given and options.draft == "ngram":
        yield "no --model_draft was named, so the text so far is the draft (--draft ngram)"
    cores = available_cpus()
    if "threads" in given and options.threads > cores:
        yield f"--threads {options.threads} is more than the {cores} cores that this process may use, and slower"
