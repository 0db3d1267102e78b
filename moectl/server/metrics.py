"""The server's counters and times, in Prometheus' text format; the cluster's state is read at each scrape."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moectl.engine.request import Stats
from moectl.server.contracts import Health

WINDOW_S = 10  # of the speed that `status` shows
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_INTER_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.64, 1.28, 2.56, 5)


class Metrics:
    """The counters of one server; `health` is called at each scrape."""

    def __init__(self, health: Callable[[], Health]) -> None:
        self._registry = r = CollectorRegistry()
        self._http = Counter("moectl_http_requests", "HTTP requests by route, status.", ["path", "status"], registry=r)
        self._requests = Counter("moectl_requests", "Requests to the model by end.", ["finish_reason"], registry=r)
        self._prompt = Counter("moectl_prompt_tokens", "Tokens of prompts.", registry=r)
        self._cached = Counter("moectl_cached_prompt_tokens", "Of those: found in the prompt cache.", registry=r)
        self._completion = Counter("moectl_completion_tokens", "Tokens generated.", registry=r)
        self._drafted = Counter("moectl_drafted_tokens", "Tokens proposed by prompt lookup.", registry=r)
        self._accepted = Counter("moectl_accepted_tokens", "Of those: confirmed by the model.", registry=r)
        name = "moectl_time_to_first_token_seconds"
        self._ttft = Histogram(name, "From a request's arrival.", buckets=_TTFT_S, registry=r)
        name = "moectl_inter_token_seconds"
        self._gap = Histogram(name, "From a token to the next.", buckets=_INTER_TOKEN_S, registry=r)
        self._registry.register(_ClusterCollector(health))

    def count_http(self, path: str, status: int) -> None:
        """Count an HTTP request; `path` is a route's, of which there are few."""
        self._http.labels(path, str(status)).inc()

    def count_token(self, since_s: float, *, first: bool) -> None:
        """Count the time from arrival to a first token, or from the token before to this one."""
        (self._ttft if first else self._gap).observe(since_s)

    def count_end(self, finish_reason: str, stats: Stats | None = None) -> None:
        """Count the end of an answer: a finish reason, "refused", or "failed"."""
        self._requests.labels(finish_reason).inc()
        if stats is not None:
            self._prompt.inc(stats.prompt_tokens)
            self._cached.inc(stats.cached_tokens)
            self._completion.inc(stats.completion_tokens)
            self._drafted.inc(stats.drafted_tokens)
            self._accepted.inc(stats.accepted_tokens)

    def write(self) -> bytes:
        return generate_latest(self._registry)


class _ClusterCollector(Collector):
    def __init__(self, health: Callable[[], Health]) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        health = self._health()
        gauges = {
            "moectl_healthy": ("1 if every rank answered and work goes on.", float(health.healthy)),
            "moectl_requests_running": ("Requests that are being answered.", health.running),
            "moectl_requests_queued": ("Requests that wait for room.", health.queued),
            "moectl_ranks": ("Ranks of the cluster.", health.ranks),
            "moectl_ranks_answered": ("Ranks that answered a heartbeat in time.", health.ranks_answered),
            "moectl_progress_age_seconds": ("Since the last sign of work.", health.progress_age_s),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        memory = GaugeMetricFamily("moectl_memory_bytes", "Memory in use by a rank's process.", labels=["rank"])
        for rank, in_use_bytes in enumerate(health.memory_bytes):
            memory.add_metric([str(rank)], in_use_bytes)
        yield memory
        yield CounterMetricFamily("moectl_restarts", "Restarts of the cluster.", health.restarts)


class Throughput:
    """A counter of tokens; made at the time when counting begins."""

    def __init__(self, now_s: float) -> None:
        self.began_s = now_s
        self.tokens = 0
        self._recent: deque[tuple[int, int]] = deque()  # (second, tokens in it), none older than the window

    def add(self, now_s: float, tokens: int = 1) -> None:
        """Count tokens that came at this time."""
        self.tokens += tokens
        second = int(now_s)
        before = self._recent.pop()[1] if self._recent and self._recent[-1][0] == second else 0
        self._recent.append((second, before + tokens))
        self._forget(now_s)

    def rate(self, now_s: float) -> float:
        """Return tokens per second since the first one within the window; 0 without any."""
        self._forget(now_s)
        if not self._recent:
            return 0.0
        return sum(tokens for _, tokens in self._recent) / max(1.0, now_s - self._recent[0][0])

    def _forget(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] <= now_s - WINDOW_S:
            self._recent.popleft()
