"""What a server tells Prometheus."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "speculative_mamba_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150)


class ServerMetrics:
    """Times and counts of calls, beside what the engine counts. stats: asked whenever the metrics are read."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats))
        self.responses = Counter(
            f"{_PREFIX}http_responses",
            "Calls of the API, by status of the answer.",
            ["status"],
            registry=self._registry,
        )
        self.under_way = Gauge(
            f"{_PREFIX}calls_under_way", "Calls whose answer is not sent yet.", registry=self._registry
        )
        self.first_token = Histogram(
            f"{_PREFIX}time_to_first_token_seconds", "From a call's arrival to the first token of a choice.",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self.duration = Histogram(
            f"{_PREFIX}call_duration_seconds", "From a call's arrival to the end of its last choice.",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        rate = stats.accepted_tokens / stats.draft_tokens if stats.draft_tokens else 0.0
        for name, what, value in (
            ("requests_running", "Texts that are being generated.", stats.running),
            ("requests_waiting", "Texts in the queue.", stats.queued),
            ("batch_size_limit", "Texts that can be generated at once.", stats.max_batch_size),
            ("tokens_per_second", "Tokens generated per second, of late.", stats.tokens_per_s),
            ("acceptance_rate", "Accepted tokens of the draft among those tested, since the start.", rate),
            ("prefix_cache_bytes", "Memory that the prefix cache holds.", stats.prefix_cache_bytes),
            ("prefix_cache_entries", "Prefixes in the cache.", stats.prefix_cache_entries),
        ):
            yield GaugeMetricFamily(_PREFIX + name, what, value=value)
        for name, what, value in (
            ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("cached_tokens", "Tokens of prompts that the prefix cache knew.", stats.cached_tokens),
            ("generated_tokens", "Tokens generated.", stats.generated_tokens),
            ("draft_tokens", "Tokens of the draft that were tested.", stats.draft_tokens),
            ("accepted_tokens", "Tokens of the draft that were accepted.", stats.accepted_tokens),
            ("rounds", "Rounds of propose, verify, accept, commit.", stats.rounds),
        ):
            yield CounterMetricFamily(_PREFIX + name, what, value=value)
        finished = CounterMetricFamily(
            _PREFIX + "requests", "Texts that have ended, by reason.", labels=["finish_reason"]
        )
        for reason, count in sorted(stats.requests.items()):
            finished.add_metric([reason], count)
        yield finished
