"""``--logprobs``: how likely each token was, and what else might have come."""

from collections.abc import Iterator, Sequence

import torch

from ..serve.token_text import TokenText


def logprobs(logits: torch.Tensor, tokens: Sequence[int], count: int, token_text: TokenText) -> list[dict]:
    """Per token its id, its text alone, its log-probability, and the ``count`` likeliest tokens with theirs.

    logits: (n, V) float32, the model's own: before penalties, temperature and filters.
    """

    def entry(token: int, logprob: float) -> dict:
        return {"token": token, "text": token_text.text_of(token), "logprob": logprob}

    report = []
    for row, token in zip(logits, tokens, strict=True):
        its = torch.log_softmax(row, 0)
        top = torch.topk(its, min(count, len(its)))
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        top_logprobs = [entry(other, logprob) for other, logprob in likeliest if logprob > -torch.inf]
        report.append(entry(token, its[token].item()) | {"top_logprobs": top_logprobs})
    return report


def table(report: Sequence[dict]) -> Iterator[str]:
    """A line for each token: its log-probability and its text, then those of the likeliest."""
    for entry in report:
        cells = [f"{each['logprob']:8.3f} {each['text']!r:12}" for each in (entry, *entry["top_logprobs"])]
        yield " | ".join(cells).rstrip()
