"""``--logprobs``: how likely each token was, and what else might have come."""

import math
from collections.abc import Iterator, Sequence

from ..decode.logprobs import TokenLogprobs
from ..serve.token_text import TokenText


def logprobs_report(tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], token_text: TokenText) -> list[dict]:
    """Per token its id, its text alone, its log-probability, and the likeliest tokens with theirs."""

    def entry(token: int, logprob: float) -> dict:
        return {"token": token, "text": token_text.text_of(token), "logprob": logprob}

    return [
        entry(token, its.logprob) | {"top_logprobs": [entry(*other) for other in its.top if other[1] > -math.inf]}
        for token, its in zip(tokens, logprobs, strict=True)
    ]


def table(entries: Sequence[dict]) -> Iterator[str]:
    """A line for each token: its log-probability and its text, then those of the likeliest."""
    for entry in entries:
        cells = [f"{each['logprob']:8.3f} {each['text']!r:12}" for each in (entry, *entry["top_logprobs"])]
        yield " | ".join(cells).rstrip()
