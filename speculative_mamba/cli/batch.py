"""``speculative-mamba batch``: a file of prompts, and a file of results that goes on where a run was cut off."""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Collection
from pathlib import Path

from ..decode.inputs import MAX_NEW_TOKENS, check_generation
from ..models import MambaLM
from ..serve.batch_files import ID, BatchCounts, BatchRunner, id_family, read_again, read_lines
from ..serve.engine import Engine
from ..serve.fields import MAX_CHOICES
from ..serve.protocol import OPENAI_SAMPLING, ServedModel
from ..serve.protocol import recommended_sampling as recommended_to_calls
from ..serve.record_file import RecordFile
from ..streams import FAILURE, PROGRAM, exit_code, say, signs_of_life
from .options import (
    Parser,
    add_engine_options,
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

# Options on which no result depends; a run may go on with others.
_FREE = {"input", "output", "unordered", "max_batch_size", "threads", "no_mmap", "rollback", "cg"}


def build_parser() -> Parser:
    parser = Parser(
        prog=f"{PROGRAM} batch",
        description="Answers a file of prompts, a line each: calls in the form of OpenAI, or plain prompts. "
        "The same command goes on where a run was cut off, by whatever.",
    )
    option = parser.option
    parser.add_argument("input", metavar="IN", help="JSON lines: prompts, or calls of the API")
    parser.add_argument("output", metavar="OUT", help="JSON lines, a result for each line of IN")
    option("unordered", action="store_true", help="write results as they are ready, not in the order of IN")
    option(
        "n_tokens_to_generate", type=integer(1, MAX_NEW_TOKENS), default=64, metavar="N",
        help="tokens to generate at most, for plain prompts; calls have their own max_tokens",
    )  # fmt: skip
    add_engine_options(parser)
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(acceptance="coupled")  # so that a text does not depend on what runs beside it
    return parser


def run(arguments: list[str]) -> int:
    parser = build_parser()
    options, given = parser.read(arguments)
    choose_draft(options, given)
    stated_sampling(options)
    family = id_family({name: value for name, value in vars(options).items() if name not in _FREE})
    source = Path(options.input)
    ids = {line.id: None for line in read_lines(source, family)}
    with RecordFile(Path(options.output), ids, family, ID) as results:
        done = len(results.done)
        if done < len(ids):
            if not options.unordered and any(map(str.__ne__, results.done, ids)):
                parser.error(f"{options.output} was begun with --unordered; go on with it")
            return _answer(options, given, family, results, ids)
    say(f"all {len(ids)} lines of {source} have their results")
    return 0


def _answer(
    options: argparse.Namespace, given: set[str], family: str, results: RecordFile, ids: Collection[str]
) -> int:
    """Answers the lines that have no result. ids: of all lines."""
    target, draft = load_models(options)
    plain = _served(options, given, target, draft)
    check_generation(
        target, rows=1, lookahead=options.K, max_new_tokens=1, sampling=plain.default_sampling,
        acceptance=options.acceptance,
    )  # fmt: skip
    calls = recommended_to_calls(target) if options.default_sampling else OPENAI_SAMPLING
    for note in notices(options, given, plain.default_sampling):
        say(note)
    engine = Engine(
        target, draft=draft, lookahead=options.K, acceptance=options.acceptance, max_batch_size=options.max_batch_size,
        max_queue_size=2 * options.max_batch_size * MAX_CHOICES, max_length=options.max_length,
        executor=executor_of(options, target),
    )  # fmt: skip
    runner = BatchRunner(
        engine, dataclasses.replace(plain, default_sampling=calls), plain,
        {"max_tokens": options.n_tokens_to_generate}, rows=options.max_batch_size, seed=options.seed,
        ordered=not options.unordered,
    )  # fmt: skip
    lines = (line for line in read_again(Path(options.input), family, ids) if line.id not in results.done)
    total = len(ids)
    if results.done:
        say(f"{len(results.done)} of {total} lines have their results; going on")
    began = time.perf_counter()

    def describe() -> str:
        return f"{len(results.done)} of {total} lines, {_speed(runner.counts, began)}"

    try:
        with (
            signs_of_life(describe, lambda: len(results.done) / total),
            contextlib.closing(runner.records(lines)) as records,
        ):
            for record in records:
                results.append(record)
        results.check()
    except KeyboardInterrupt as interrupt:
        say(f"interrupted: {len(results.done)} of {total} lines have their results; the same command goes on")
        return exit_code(interrupt)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        say(
            f"error: {reason}; {len(results.done)} of {total} lines have their results. The same command goes on, "
            "where memory is short with a smaller --max_batch_size"
        )
        return FAILURE
    finally:
        engine.close(drain=False)
    counts = runner.counts
    line = f"{counts.lines} lines in {time.perf_counter() - began:.1f} s, {_speed(counts, began)}"
    if counts.draft_tokens:
        line += f"; acceptance rate {counts.accepted_tokens / counts.draft_tokens:.2f}"
    if counts.refused:
        line += f"; {counts.refused} of the lines were refused, and their results say why"
    say(line)
    return 0


def _served(options: argparse.Namespace, given: set[str], target: MambaLM, draft: MambaLM | str | None) -> ServedModel:
    """The model as plain lines have it."""
    sampling = stated_sampling(options)
    if options.default_sampling:
        sampling, note = recommended_sampling(options, given, target)
        say(note)
    name = draft.name if isinstance(draft, MambaLM) else draft
    return ServedModel(target, options.served_model_name or target.name, options.max_length, sampling, draft=name)


def _speed(counts: BatchCounts, began: float) -> str:
    return f"{counts.tokens / (time.perf_counter() - began):.1f} tokens/s"
