"""The command line: text to stdout, everything else to stderr."""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .decode import GenerationResult, GraphExecutor, SamplingParams, generate
from .decode.inputs import ACCEPTANCES, NAMED_DRAFTS, check_generation, check_models
from .decode.text import TextStream
from .info import print_info
from .models import MambaLM, load_model
from .models.language_model import CHECKPOINTS

PROMPT = '"You are very kind," said'
FAILURE, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(FAILURE, f"{self.prog}: error: {message} (--help lists the options)\n")


def _lookahead(value: str) -> int | str:
    try:
        return value if value == "auto" else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be auto or a whole number, got {value!r}") from None


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {value!r}")
    return int(value)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="speculative-mamba",
        description="Generates text with a Mamba target model, sped up by a draft model without changing the output. "
        "With no options it runs the embedded byte-level pair. 'speculative-mamba info' describes the installation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def option(name: str, **settings: object) -> None:
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))  # both spellings
        parser.add_argument(*names, **settings)

    option("prompt", default=PROMPT, help="text to continue")
    option("n_tokens_to_generate", type=int, default=64, metavar="N", help="tokens to generate at most")
    option("K", type=_lookahead, default=4, help="tokens drafted per round, 1 to 15, or auto")
    option("model_target", default="builtin:target", metavar="MODEL", help="folder, hub id or builtin:target")
    option("model_draft", default="builtin:draft", metavar="MODEL", help="folder, hub id or builtin:draft")
    option(
        "draft", choices=("model", *NAMED_DRAFTS, "none"), default="model",
        help="who drafts: model_draft, or the text so far without a model; none is plain decoding",
    )  # fmt: skip
    option("dtype", help="float32, bfloat16, float16 or int8 weights (default: as stored)", default=argparse.SUPPRESS)
    option("state_dtype", default="float32", help="float32, bfloat16 or float16 for the recurrent state")
    option("checkpoint", choices=CHECKPOINTS, default="auto", help="how to go back: states, or inputs to compute again")
    option("device", default="cpu", help="cpu or cuda")
    option("backend", default="auto", help="auto, cpu (C++), cuda (CUDA C++), triton or reference (PyTorch)")
    option("threads", type=_positive, help="threads to use (default: one per core)", default=argparse.SUPPRESS)
    option("temperature", type=float, default=0.0, help="0 is greedy")
    option("top_k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    option("top_p", type=float, default=1.0, help="keep the smallest set of tokens with this probability")
    option("min_p", type=float, default=0.0, help="keep tokens of at least p times the largest probability")
    option("repetition_penalty", type=float, default=1.0, help="above 1, tokens of the text become less likely")
    option("acceptance", choices=ACCEPTANCES, default="rejection", help="coupled: the text of plain sampling, exactly")
    option("seed", type=int, default=0, help="seed for sampling")
    option("stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated")
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
        if arguments[:1] == ["info"]:
            print_info()
            return 0
        return _run(build_parser().parse_args(arguments))
    except ValueError as error:
        _say(f"error: {error}")
        return FAILURE
    except torch.cuda.OutOfMemoryError as error:
        _say(f"error: {str(error).splitlines()[0]} Try a smaller --dtype, --checkpoint inputs or fewer tokens.")
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _say(message: str) -> None:
    print(f"speculative-mamba: {message}", file=sys.stderr, flush=True)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _run(options: argparse.Namespace) -> int:
    sampling = SamplingParams(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
        repetition_penalty=options.repetition_penalty, seed=options.seed,
    )  # fmt: skip
    if hasattr(options, "threads"):
        torch.set_num_threads(options.threads)
    common = {
        "dtype": getattr(options, "dtype", None), "state_dtype": options.state_dtype,
        "checkpoint": options.checkpoint, "device": options.device, "backend": options.backend,
    }  # fmt: skip
    target = load_model(options.model_target, **common)
    draft = options.draft if options.draft in NAMED_DRAFTS else None
    if options.draft == "model":
        draft = load_model(options.model_draft, **common)
    check_models(target, draft)
    check_generation(
        target, rows=1, lookahead=options.K, max_new_tokens=options.n_tokens_to_generate, sampling=sampling,
        acceptance=options.acceptance, stop_strings=options.stop,
    )  # fmt: skip
    executor = GraphExecutor() if options.cg and target.device.type == "cuda" else "eager"
    if options.cg and executor == "eager":
        _say(f"--cg: no CUDA graphs on device {target.device.type}; the text is the same without")
    prompt = _encode(target, options.prompt)

    def once(draft: MambaLM | str | None, output: _Output | None = None) -> GenerationResult:
        return generate(
            target, [prompt], draft=draft, lookahead=options.K, max_new_tokens=options.n_tokens_to_generate,
            sampling=sampling, acceptance=options.acceptance, stop_strings=options.stop,
            on_token=output.on_token if output else None, executor=executor,
        )  # fmt: skip

    show = _write if options.stream and not options.json else None
    output = _Output(TextStream(target.tokenizer, options.stop), show)
    if show:
        show(options.prompt)
    result, comparison, code = None, None, 0
    try:
        result = once(draft, output)
        _report(target, draft, result)
        if options.compare:
            comparison = _compare(once, draft, result, sampling.greedy or options.acceptance == "coupled")
    except KeyboardInterrupt:
        _say(f"interrupted after {len(output.tokens)} tokens")
        code = INTERRUPTED
    output.finish()
    if options.json:
        report = {"prompt_tokens": prompt, "tokens": output.tokens, "text": output.text}
        report["stats"] = result.stats.as_dict() if result else None
        if comparison is not None:
            report["compare"] = comparison
        _write(json.dumps(report) + "\n")
    else:
        _write("\n" if show else f"{options.prompt}{output.text}\n")
    return code


def _encode(target: MambaLM, prompt: str) -> list[int]:
    if target.tokenizer is None:
        raise ValueError(
            f"{target.name} has no tokenizer; put tokenizer.json into its folder (state-spaces models use that of "
            "EleutherAI/gpt-neox-20b), or pass token ids from Python"
        )
    ids = target.tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    return ids


def _report(target: MambaLM, draft: MambaLM | str | None, result: GenerationResult) -> None:
    stats = result.stats
    names = target.name if draft is None else f"{target.name} with draft {getattr(draft, 'name', draft)}"
    _say(f"{names}, backend {target.backend}, {torch.get_num_threads()} threads")
    if not stats.tokens:
        return
    line = f"{stats.tokens} tokens in {stats.decode_s:.3f} s: {stats.tokens_per_s:.1f} tokens/s"
    line += f" after {stats.prefill_s:.3f} s for {stats.prompt_tokens} prompt tokens"
    if stats.tested:
        line += f"; acceptance rate {stats.acceptance_rate:.2f} ({stats.accepted} of {stats.tested} tested)"
        line += f", {stats.tokens_per_round:.2f} tokens per round"
    _say(line)
    if stats.draft_dropped_at is not None:
        _say(f"--K auto: the draft did not pay, so after {stats.draft_dropped_at} rounds it was left out")


def _compare(
    once: Callable[[MambaLM | str | None], GenerationResult],
    draft: MambaLM | str | None,
    shown: GenerationResult,
    same_text: bool,
) -> dict:
    """Times plain and speculative decoding in turn, three times each if that is quick; the medians are compared."""
    plain_speeds, speeds = [], []
    for _ in range(3 if shown.stats.decode_s < 2 else 1):
        plain, speculative = once(None), once(draft)
        plain_speeds.append(plain.stats.tokens_per_s or 0.0)
        speeds.append(speculative.stats.tokens_per_s or 0.0)
    plain_speed, speed = statistics.median(plain_speeds), statistics.median(speeds)
    # Under rejection sampling the law is equal, not the text.
    equal = torch.equal(plain.sequences[0], shown.sequences[0]) if same_text else None
    ratio = speed / plain_speed if plain_speed else None
    verdicts = {True: "the tokens are equal", False: "THE TOKENS DIFFER", None: "sampled: equal in law, not in text"}
    if ratio is not None:
        _say(f"plain {plain_speed:.1f} tokens/s, with draft {speed:.1f} tokens/s, ratio {ratio:.2f}; {verdicts[equal]}")
    return {"tokens_equal": equal, "plain_tokens_per_s": plain_speed, "ratio": ratio}


if __name__ == "__main__":
    sys.exit(main())
