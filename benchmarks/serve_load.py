"""Many clients at an engine: every text against its own ``generate``, speed against a static batch.

python -m benchmarks.serve_load [--requests 1000] [--clients 64] [--width 32] [--json FILE]

Prompts are cut from text that the embedded pair has not seen; budgets, sampling parameters, stops, draft on or off and
log-probabilities are drawn at random; 5 % of the requests are cancelled, 5 % cannot be served. Clients are threads that
ask again when they have their answer. The engine is timed from when the first requests of all clients and rows have
ended, so that rows are anywhere in their texts, until no client has more to ask. Static batches of as many rows take
turns with it, for the prompts and parameters of the requests that it began to answer in that time, and for as many
tokens, the same number in each row: no row waits for another. They know nothing of stops, log-probabilities, text or
rows without draft, so they are as good as can be. ratio is the engine's tokens per second over theirs, prompts
included; cpu_ratio the same per second of CPU time of the process, of which clients' threads took the share client_cpu;
kept_ratio over static batches that an ``EagerExecutor`` runs, which keeps what the batches before had to record. Times
to the first token begin with ``submit``, so they include the wait for a row; times between tokens are those between
rounds that gave any. Memory is what the process holds.
"""

import dataclasses
import itertools
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import speculative_mamba as sm

from .report import Report, number, parser, progress, seconds

BUDGETS = (16, 32, 64, 128)
PROMPTS = (8, 20, 50, 120, 300)  # tokens
SAMPLING = (
    {}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.7, "top_k": 20},
    {"repetition_penalty": 1.1}, {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.2},
)  # fmt: skip
WRONG = (
    {"prompt": []}, {"prompt": [10**6]}, {"max_new_tokens": -1}, {"stop_token_ids": [-1]}, {"stop_strings": [""]},
    {"logprobs": 99}, {"sampling": sm.SamplingParams(logit_bias={10**6: 1.0})},
)  # fmt: skip
STATIC_RUNS = 3


@dataclasses.dataclass
class Answer:
    """What a client saw. asked: when. times: since then, of each round that gave tokens."""

    request: sm.Request
    asked: float
    tokens: list[int]
    reason: str
    times: list[float]


class Texts:
    """Draws requests."""

    def __init__(self, target: sm.MambaLM, seed: int) -> None:
        text = Path(sm.__file__).parent.joinpath("models", "builtin", "heldout.txt").read_text("utf-8")
        self._ids, self._source = target.tokenizer.encode(text).ids, random.Random(seed)

    def prompt(self) -> list[int]:
        length = self._source.choice(PROMPTS)
        at = self._source.randrange(len(self._ids) - length)
        return self._ids[at : at + length]

    def sampling(self) -> sm.SamplingParams:
        return sm.SamplingParams(**self._source.choice(SAMPLING), seed=self._source.randrange(2**31))

    def request(self) -> tuple[sm.Request, int | None]:
        """And after how many tokens its client leaves."""
        source = self._source
        request = sm.Request(
            self.prompt(), source.choice(BUDGETS), self.sampling(), stop_token_ids=(),
            stop_strings=source.choice([(), (), (), ("\n\n",), ("upon", "?")]), use_draft=source.random() < 0.98,
            logprobs=source.choice([None] * 9 + [2]),
        )  # fmt: skip
        fate = source.random()
        if fate < 0.05:
            request = dataclasses.replace(request, **source.choice(WRONG))
        return request, source.randrange(12) if fate > 0.95 else None


def static_speed(
    target: sm.MambaLM, draft: sm.MambaLM, requests: list[sm.Request], budget: int, width: int,
    executor: sm.EagerExecutor | str,
) -> tuple[float, float]:  # fmt: skip
    """Tokens per second, and per second of CPU time, of full batches that answer the same prompts with the same
    parameters, each row with this budget; prompts included."""
    tokens, began, cpu = 0, time.perf_counter(), time.process_time()
    for at in range(0, len(requests) - width + 1, width):
        batch = requests[at : at + width]
        tokens += sm.generate(
            target, [request.prompt for request in batch], draft=draft, max_new_tokens=budget,
            sampling=[request.sampling for request in batch], acceptance="coupled", stop_token_ids=(),
            executor=executor,
        ).stats.tokens  # fmt: skip
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu)


class Clients:
    """Threads that ask an engine, and what each request came to. begun: requests whose answers began while it was
    timed; tokens: how many came meanwhile. client_cpu: the threads' share of the CPU time of the process."""

    def __init__(self, engine: sm.Engine, requests: list[tuple[sm.Request, int | None]], clients: int) -> None:
        self.answers: list[Answer] = []
        self.begun: list[sm.Request] = []
        self.refused = self.tokens = 0
        self._engine, self._count, self._clients = engine, len(requests), clients
        self._left, self._lock = list(reversed(requests)), threading.Lock()
        self.tokens_per_s = self.tokens_per_cpu_s = self.client_cpu = 0.0

    def run(self) -> None:
        """Until all are answered."""
        opened = time.process_time()
        with ThreadPoolExecutor(self._clients) as threads:
            clients = [threads.submit(self._client) for _ in range(self._clients)]
            warm = min(self._clients + self._engine.max_batch_size, self._count // 2)
            while len(self._left) > self._count - warm:
                time.sleep(0.01)
            began, cpu, before = time.perf_counter(), time.process_time(), self._engine.stats().generated_tokens
            while self._left:
                time.sleep(0.01)
            ended, self.tokens = time.perf_counter(), self._engine.stats().generated_tokens - before
            self.tokens_per_s = self.tokens / (ended - began)
            self.tokens_per_cpu_s = self.tokens / (time.process_time() - cpu)
            clients_s = sum(client.result() for client in clients)
            self.client_cpu = clients_s / (time.process_time() - opened)
            firsts = [(answer.asked + answer.times[0], answer) for answer in self.answers if answer.times]
            begun = [answer.request for first, answer in firsts if began <= first < ended]
            few = len(begun) < self._engine.max_batch_size  # in a run to see that it works
            self.begun = [answer.request for answer in self.answers] if few else begun

    def _client(self) -> float:
        """Its CPU time."""
        began = time.thread_time()
        while True:
            with self._lock:
                if not self._left:
                    return time.thread_time() - began
                request, leaves_after = self._left.pop()
            self._ask(request, leaves_after)

    def _ask(self, request: sm.Request, leaves_after: int | None) -> None:
        began = time.perf_counter()
        try:
            completion = self._engine.submit(request)
        except ValueError:
            self.refused += 1
            return
        times: list[float] = []
        for seen, _ in enumerate(completion):
            now = time.perf_counter() - began
            if not times or now - times[-1] > 1e-3:
                times.append(now)
            if leaves_after is not None and seen >= leaves_after:
                completion.cancel()
        output = completion.result()
        self.answers.append(Answer(request, began, output.tokens, output.finish_reason, times))


def check(target: sm.MambaLM, answers: list[Answer]) -> None:
    """Every text is that of its request alone, decoded plainly."""
    for answer in answers:
        request = answer.request
        result = sm.generate(
            target, [request.prompt], max_new_tokens=request.max_new_tokens, stop_token_ids=(),
            sampling=dataclasses.replace(request.sampling, seed=[request.sampling.seed]), acceptance="coupled",
            stop_strings=request.stop_strings,
        )  # fmt: skip
        expected = result.sequences[0].tolist()[len(request.prompt) :]
        if answer.reason == "cancelled":
            expected = expected[: len(answer.tokens)]
        if answer.tokens != expected or answer.reason not in ("cancelled", *result.finish_reasons):
            raise SystemExit(f"another text than its own generate: {request}")


def resident_bytes() -> int:
    """Of this process, on Linux."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--requests", type=int, default=1000)
    arguments.add_argument("--clients", type=int, default=64, help="threads, each with one request at a time")
    arguments.add_argument("--width", type=int, default=32, help="rows of the engine and of the static batch")
    options = arguments.parse_args()
    target, draft = sm.load_model("builtin:target"), sm.load_model("builtin:draft")
    report = Report(
        {
            "part": str, "answered": str, "cancelled": str, "refused": str, "tokens_per_s": number, "static": number,
            "ratio": number, "cpu_ratio": number, "kept_ratio": number, "client_cpu": number, "first_p50": seconds,
            "first_p95": seconds, "between_p50": seconds, "between_p95": seconds, "resident_mb": number,
        }
    )  # fmt: skip
    texts, answers = Texts(target, 0), []
    with sm.Engine(
        target, draft=draft, acceptance="coupled", max_batch_size=options.width, max_queue_size=options.clients
    ) as engine:
        for part in range(STATIC_RUNS):
            count = options.requests * (part + 1) // STATIC_RUNS - options.requests * part // STATIC_RUNS
            progress(f"{count} requests of {options.clients} clients, part {part + 1} of {STATIC_RUNS}")
            clients = Clients(engine, [texts.request() for _ in range(count)], options.clients)
            clients.run()
            resident = resident_bytes()
            progress("static batches")
            budget = max(round(clients.tokens / len(clients.begun)), 1)
            static, kept = (
                static_speed(target, draft, clients.begun, budget, options.width, executor)
                for executor in ("eager", sm.EagerExecutor())
            )
            first = [answer.times[0] for answer in clients.answers if answer.times]
            between = [
                later - earlier for answer in clients.answers for earlier, later in itertools.pairwise(answer.times)
            ]
            report.add(
                part=part + 1, answered=len(clients.answers), refused=clients.refused,
                cancelled=sum(answer.reason == "cancelled" for answer in clients.answers),
                tokens_per_s=clients.tokens_per_s, static=static[0], ratio=clients.tokens_per_s / static[0],
                cpu_ratio=clients.tokens_per_cpu_s / static[1], kept_ratio=clients.tokens_per_s / kept[0],
                client_cpu=clients.client_cpu, first_p50=percentile(first, 0.5), first_p95=percentile(first, 0.95),
                between_p50=percentile(between, 0.5), between_p95=percentile(between, 0.95),
                resident_mb=resident / 1e6, width=options.width, clients=options.clients,
            )  # fmt: skip
            answers += clients.answers
        stats = engine.stats()
        if stats.running or stats.queued:
            raise SystemExit(f"rows were not given back: {stats}")
    progress("each text on its own")
    check(target, answers)
    print(f"{len(answers)} texts equal their own generate; no row is left; {stats.requests}")
    report.write(options.json)


if __name__ == "__main__":
    main()
