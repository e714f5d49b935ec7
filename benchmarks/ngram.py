"""Times the n-gram draft against plain decoding: on a source file, an edited copy of the prompt, and random tokens.

python -m benchmarks.ngram [--models 370m] [--text FILE] [--K 4] [--tokens 256] [--json FILE]

The target has random bf16 weights, so its own text is noise. Therefore the n-gram draft reads the stated text, and
wherever its proposal for a position is right there, the target's own token is proposed, else a wrong one: every pass of
the target is real, and what is accepted is what would be if the target wrote that text. Tokens of a file are its words,
runs of blanks and single other characters. The copy has every 25th token replaced. Runs of plain decoding and of the
draft take turns; the clock covers decoding of one row after prefill. asked: the share of rounds with a proposal.
"""

import random
import re
import statistics
from pathlib import Path

import torch

import speculative_mamba as sm
from speculative_mamba.testing.models import SHAPES, published_config, random_model

from .report import Report, number, parser, progress, share

SOURCE = Path(sm.__file__).parent / "decode" / "generate.py"
PROMPT_TOKENS, COPY_TOKENS = 256, 200


class Replay:
    """The proposals of an n-gram draft on one text, right or wrong as they are there, made for another text."""

    def __init__(self, text: list[int], own: list[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._text, self._own = text, torch.tensor(own)
        self._drafter = sm.NgramDrafter(vocab_size)

    def begin(self, prompts: list[list[int]], lookahead: int, sampler: sm.Sampler) -> None:
        self._drafter.begin([self._text[: len(prompts[0])]], lookahead, sampler)

    def propose(self, rows: list[list[int]], accepted: torch.Tensor, lookahead: int) -> tuple[torch.Tensor, None]:
        at = len(rows[0])
        tokens, _ = self._drafter.propose([self._text[:at]], accepted, lookahead)
        window = slice(at, at + tokens.shape[1])
        right, own = tokens == torch.tensor([self._text[window]]), self._own[None, window]
        return torch.where(right, own, (own + 1) % self.vocab_size), None


def read_tokens(path: Path) -> list[int]:
    """Numbers of a file's words, runs of blanks and other characters, in the order of their first appearance."""
    pieces = re.findall(r"\w+|[ \t]+|.", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(piece, len(numbers)) for piece in pieces]


def texts(path: Path, tokens: int, vocabulary: int) -> dict[str, tuple[list[int], int]]:
    """Per case a text and the length of the prompt that it begins with; ``tokens`` follow, or as many as there are."""
    source, draw = read_tokens(path), random.Random(0)
    if len(source) <= PROMPT_TOKENS + 1 or max(source) >= vocabulary:
        raise SystemExit(f"{path}: needs more than {PROMPT_TOKENS + 1} tokens, and at most {vocabulary} different ones")
    copied = source[:COPY_TOKENS]
    edited = [token if at % 25 else draw.randrange(vocabulary) for at, token in enumerate(copied, 1)]
    noise = [draw.randrange(vocabulary) for _ in range(PROMPT_TOKENS + tokens)]
    return {
        "source file": (source[: PROMPT_TOKENS + tokens], PROMPT_TOKENS),
        "edited copy": ((copied + edited)[: COPY_TOKENS + 2 + tokens], COPY_TOKENS + 2),
        "random tokens": (noise, PROMPT_TOKENS),
    }


def bench(report: Report, name: str, case: str, target: sm.MambaLM, text: list[int], prompt_tokens: int,
          lookahead: int | str, repeats: int) -> None:  # fmt: skip
    prompt, budget = text[:prompt_tokens], len(text) - prompt_tokens
    settings = {"lookahead": lookahead, "max_new_tokens": budget, "stop_token_ids": ()}
    progress(f"mamba-{name}, {case}: the target's own text")
    own = sm.generate(target, [prompt], **settings).sequences[0].tolist()
    plain, drafted = [], []
    for repeat in range(repeats):
        progress(f"mamba-{name}, {case}: pair of runs {repeat + 1} of {repeats}")
        plain.append(sm.generate(target, [prompt], **settings).stats)
        result = sm.generate(target, [prompt], draft=Replay(text, own, target.vocab_size), **settings)
        if result.sequences[0].tolist() != own:
            raise SystemExit(f"mamba-{name}, {case}: text differs from plain decoding; not timed")
        drafted.append(result.stats)
    speed, plain_speed = (statistics.median(stats.tokens_per_s for stats in runs) for runs in (drafted, plain))
    stats = drafted[-1]
    report.add(
        op="generate", case=f"mamba-{name} {case}", backend=target.backend, batch=1, tokens=budget,
        shape=f"{target.config.d_model}x{len(target.blocks)}", dtype="bfloat16", tokens_per_s=speed,
        ratio=speed / plain_speed, asked=stats.tested_per_position[0] / stats.row_rounds,
        acceptance=stats.acceptance_rate, tokens_per_round=stats.tokens_per_round, baseline="plain decoding",
    )  # fmt: skip


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", nargs="*", default=["370m"], choices=SHAPES, help="whose shapes to run")
    arguments.add_argument("--text", type=Path, default=SOURCE, help="a file with repetitions")
    arguments.add_argument(
        "--K", type=lambda value: value if value == "auto" else int(value), default=4, help="1 to 15, or auto"
    )
    arguments.add_argument("--tokens", type=int, default=256, help="tokens per run, at least 2")
    arguments.add_argument("--repeats", type=int, default=3, help="interleaved runs; medians are shown")
    options = arguments.parse_args()
    report = Report(
        {
            "case": str, "tokens_per_s": number, "ratio": number, "asked": share, "acceptance": number,
            "tokens_per_round": number,
        }
    )  # fmt: skip
    for name in options.models:
        progress(f"drawing the weights of mamba-{name}")
        target = random_model(published_config(name), dtype=torch.bfloat16)
        for case, (text, prompt_tokens) in texts(options.text, options.tokens, target.vocab_size).items():
            bench(report, name, case, target, text, prompt_tokens, options.K, options.repeats)
    report.write(options.json)


if __name__ == "__main__":
    main()
