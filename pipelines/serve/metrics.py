"""What Prometheus is told: requests, times, tokens, the bank's hits. Each ingress replica counts for itself.

Times to the first token are those of the replica, from the arrival of a question; times between tokens are
taken here, where a client sees them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from http import HTTPMethod, HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric

from pipelines.serve.contracts import Event, Finished, Fusion, Piece, Started

__all__ = ["Metrics"]

SHORT_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
LONG_SECONDS = (*SHORT_SECONDS, 20, 60, 120, 300)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
NO_MODEL = ""


class Metrics:
    """Counters of one process, in a registry of their own.

    Args:
        replica: of several that answer at one address, which tells their counters apart; else empty.
    """

    def __init__(self, replica: str = "") -> None:
        self._registry, self._replica = CollectorRegistry(), replica
        self._models: set[str] = set()
        self._requests = self._counter("requests", "Requests answered.", "method", "route", "status", "model")
        self._seconds = self._histogram(
            "request_seconds", "From a request's first byte to the last of its answer.", LONG_SECONDS, "route"
        )
        self._in_flight = Gauge("mmicl_requests_in_flight", "Requests under way.", registry=self._registry)
        self._limited = self._counter(
            "rate_limited", "Requests refused with 429, by the limits of a key or by a full queue.", "by"
        )
        self._first = self._histogram(
            "time_to_first_token_seconds",
            "From the arrival of a question in a replica to the first token of each answer.",
            LONG_SECONDS,
            "model",
        )
        self._between = self._histogram(
            "inter_token_seconds",
            "Between tokens; the mean of an answer that is no stream.",
            SHORT_SECONDS,
            "model",
        )
        self._queue = self._histogram(
            "queue_seconds", "That a question waited in a replica.", LONG_SECONDS, "model"
        )
        self._batch = self._histogram(
            "batch_size", "Answers that grew in the replica when a prompt had been read.", BATCHES, "model"
        )
        self._tokens = self._counter("tokens", "Tokens; cached ones are part of the prompt.", "model", "kind")
        self._saved = self._counter(
            "demonstration_tokens_saved",
            "Tokens that demonstrations would cost in full, less what they cost.",
            "model",
        )
        self._bank = self._counter("bank_demonstrations", "Demonstrations looked up in the bank.", "result")
        self._replicas = Gauge("mmicl_replicas", "Running replicas.", ["deployment"], registry=self._registry)

    def request_started(self) -> None:
        """Count a request as under way."""
        self._in_flight.inc()

    def request_finished(
        self,
        method: str,
        route: str,
        status: int,
        seconds: float,
        model: str | None = None,
        by_key: bool = False,
    ) -> None:
        """Count a request that is over.

        Args:
            route: its template.
            status: 499 where the client had gone.
            model: as the request names it.
            by_key: whether the limits of its key refused it.
        """
        self._in_flight.dec()
        known = method if method in HTTPMethod.__members__ else "other"
        self._requests.labels(known, route, str(status), self.model_label(model, status)).inc()
        self._seconds.labels(route).observe(seconds)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            self._limited.labels("key" if by_key else "queue").inc()

    def model_label(self, model: str | None, status: int = HTTPStatus.BAD_REQUEST) -> str:
        """The model if it is served; what else a caller may write there would be a time series each."""
        if model is not None and status < HTTPStatus.BAD_REQUEST:
            self._models.add(model)
        return model if model in self._models and model is not None else NO_MODEL

    def observe_fusion(self, fusion: Fusion) -> None:
        """Count which of a request's demonstrations the bank had."""
        self._bank.labels("hit").inc(fusion.known)
        self._bank.labels("miss").inc(len(fusion.tokens_full) - fusion.known)

    def observe_answer(self, model: str, events: Sequence[Event], seconds: float) -> None:
        """Observe a whole answer.

        Args:
            seconds: from the question to all of its events.
        """
        self._observe(model, events)
        for event in events:
            if isinstance(event, Finished) and event.completion_tokens > 1:
                rest = max(0.0, seconds - event.ttft_ms / 1000)
                self._between.labels(model).observe(rest / (event.completion_tokens - 1))

    async def follow(
        self, model: str, events: AsyncIterator[tuple[Event, ...]]
    ) -> AsyncIterator[tuple[Event, ...]]:
        """Pass on the events of a stream and observe them; closed early, it closes `events` too."""
        last: dict[int, float] = {}
        try:
            async for group in events:
                self._observe(model, group)
                now = time.perf_counter()
                for index in dict.fromkeys(event.index for event in group if isinstance(event, Piece)):
                    if index in last:
                        self._between.labels(model).observe(now - last[index])
                    last[index] = now
                yield group
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    def page(self, replicas: Mapping[str, int]) -> tuple[bytes, str]:
        """All of it as Prometheus reads it, and its content type.

        Args:
            replicas: that run now, by deployment.
        """
        self._replicas.clear()
        for deployment, count in replicas.items():
            self._replicas.labels(deployment).set(count)
        return generate_latest(_Labelled(self._registry, self._replica)), CONTENT_TYPE_PLAIN_0_0_4

    def _observe(self, model: str, events: Iterable[Event]) -> None:
        self._models.add(model)
        for event in events:
            if isinstance(event, Started):
                self._queue.labels(model).observe(event.queued_ms / 1000)
                self._batch.labels(model).observe(event.batch)
                self._tokens.labels(model, "prompt").inc(event.prompt_tokens)
                self._tokens.labels(model, "cached").inc(event.cached_tokens)
                self._saved.labels(model).inc(max(0, event.demo_tokens_full - event.demo_tokens))
            elif isinstance(event, Finished):
                self._first.labels(model).observe(event.ttft_ms / 1000)
                self._tokens.labels(model, "completion").inc(event.completion_tokens)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"mmicl_{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"mmicl_{name}", about, labels, registry=self._registry, buckets=buckets)


class _Labelled(CollectorRegistry):
    """What another registry holds, with the name of the replica on every sample."""

    def __init__(self, registry: CollectorRegistry, replica: str) -> None:
        super().__init__()
        self._of, self._labels = registry, {"replica": replica} if replica else {}

    def collect(self) -> Iterator[Metric]:
        for family in self._of.collect():
            family.samples = [
                sample._replace(labels={**sample.labels, **self._labels}) for sample in family.samples
            ]
            yield family
