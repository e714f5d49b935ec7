"""Answers in OpenAI's form: whole ones, and the chunks of a stream."""

import secrets
import time
from collections.abc import Iterator, Sequence

from .completion import Completion, RequestOutput, TokenOutput
from .protocol import Call, ServedModel

_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
_IMPOSSIBLE = -9999.0  # OpenAI's; JSON has no infinity


class Answer:
    """The answer to one call."""

    def __init__(self, call: Call, served: ServedModel) -> None:
        self._call, self._token_text = call, served.token_text
        kind, prefix = ("chat.completion", "chatcmpl") if call.chat else ("text_completion", "cmpl")
        if call.chat and call.stream:
            kind = "chat.completion.chunk"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()),
            "model": served.name,
        }  # fmt: skip
        self._lengths = [len(call.echo(index)) for index in range(len(call.requests))]  # characters sent, per choice
        self._tokens = 0  # sent

    def body(self, outputs: Sequence[RequestOutput]) -> dict:
        """All at once. outputs: one per request of the call."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return {**self._head, "choices": choices, "usage": self._usage(outputs)}

    def first_chunks(self) -> Iterator[dict]:
        """What each choice begins with, before there are tokens."""
        for index in range(len(self._call.requests)):
            if self._call.chat:
                yield self._chunk(index, {"role": "assistant", "content": ""})
            elif echo := self._call.echo(index):
                yield self._chunk(index, echo)

    def token_chunk(self, index: int, output: TokenOutput, completions: Sequence[Completion]) -> dict:
        """completions: those of the call, as far as they are."""
        logprobs = self._logprobs([output], self._lengths[index])
        self._lengths[index] += len(output.text)
        self._tokens += 1
        text = {"content": output.text} if self._call.chat else output.text
        chunk = self._chunk(index, text, logprobs=logprobs, drafted=output.drafted)
        return chunk | {"usage": self._counts(self._tokens, completions)} if self._call.continuous_usage else chunk

    def last_chunk(self, index: int, output: RequestOutput) -> dict:
        """The reason why a choice ended, with the text that was held back until then."""
        rest = output.text[self._lengths[index] - len(self._call.echo(index)) :]
        text = ({"content": rest} if rest else {}) if self._call.chat else rest
        return self._chunk(index, text, finish_reason=_FINISH_REASONS[output.finish_reason])

    def usage_chunk(self, outputs: Sequence[RequestOutput]) -> dict:
        return {**self._head, "choices": [], "usage": self._usage(outputs)}

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict:
        cached = sum(output.cached_tokens for output in outputs[:: self._call.n])
        counts = self._counts(sum(len(output.tokens) for output in outputs), outputs)
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}

    def _counts(self, new: int, drafted: Sequence[Completion | RequestOutput]) -> dict:
        """Tokens of a call. A prompt counts once, however many texts are made of it."""
        prompt = sum(len(request.prompt) for request in self._call.requests[:: self._call.n])
        tested, accepted = sum(one.draft_tokens for one in drafted), sum(one.accepted_tokens for one in drafted)
        details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": tested - accepted}
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "completion_tokens_details": details,
        }  # fmt: skip

    def _chunk(self, index: int, text: str | dict, **more: object) -> dict:
        field = "delta" if self._call.chat else "text"
        choice = {"index": index, field: text, "logprobs": None, "finish_reason": None, **more}
        no_usage = {"usage": None} if self._call.include_usage else {}
        return {**self._head, "choices": [choice], **no_usage}

    def _choice(self, index: int, output: RequestOutput) -> dict:
        echo = self._call.echo(index)
        text = echo + output.text
        said = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self._call.chat else {"text": text}
        )
        logprobs = self._logprobs(output.outputs, len(echo))
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": _FINISH_REASONS[output.finish_reason]}

    def _logprobs(self, outputs: Sequence[TokenOutput], offset: int) -> dict | None:
        """offset: characters of the text before these tokens."""
        if self._call.requests[0].logprobs is None:
            return None
        if self._call.chat:
            return {"content": [self._chat_logprob(output) for output in outputs], "refusal": None}
        offsets = []
        for output in outputs:
            offsets.append(offset)
            offset += len(output.text)
        text_of = self._token_text.text_of
        own = [{text_of(output.token): _finite(output.logprob)} for output in outputs]
        top = [{text_of(token): _finite(logprob) for token, logprob in output.top_logprobs} for output in outputs]
        return {
            "tokens": [text_of(output.token) for output in outputs],
            "token_logprobs": [_finite(output.logprob) for output in outputs],
            "top_logprobs": [likeliest | its for likeliest, its in zip(top, own, strict=True)],
            "text_offset": offsets,
        }

    def _chat_logprob(self, output: TokenOutput) -> dict:
        def entry(token: int, logprob: float) -> dict:
            data = self._token_text.bytes_of(token)
            return {"token": self._token_text.text_of(token), "bytes": list(data), "logprob": _finite(logprob)}

        top = [entry(token, logprob) for token, logprob in output.top_logprobs]
        return {**entry(output.token, output.logprob), "top_logprobs": top}


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
