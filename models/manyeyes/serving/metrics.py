"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from manyeyes.serving.hosting import Host

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counts of one server.

    Args:
        host: Whose engine is asked for its state.
    """

    def __init__(self, host: Host) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "manyeyes_requests", "Chat requests by HTTP status.", ["status"], registry=self.registry
        )
        self.first_token = Histogram(
            "manyeyes_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.rate = Histogram(
            "manyeyes_tokens_per_second", "Of one answer after its first token.", buckets=_RATES, registry=self.registry
        )
        self.tokens = Counter("manyeyes_tokens", "Tokens asked and written.", ["kind"], registry=self.registry)
        self.registry.register(_EngineCollector(host))


class _EngineCollector(Collector):
    """Reads the engine when it is asked; counts of the engine begin anew with another champion."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterator[Metric]:
        served, host = self._host.served, self._host
        state = served.engine.state()
        for name, text, value in (
            ("waiting", "Requests that are not in the batch yet.", state.waiting),
            ("running", "Answers in the batch.", state.running),
            ("batch_tokens", "Slots of the batch that are reserved.", state.tokens),
            ("batch_tokens_limit", "Slots that the batch may have.", state.max_tokens),
            ("cache_bytes", "Bytes of visual tokens and prefixes that are kept.", state.cache_bytes),
        ):
            yield GaugeMetricFamily(f"manyeyes_{name}", text, value)
        for name, text, counts in (
            ("cache_hits", "Found in the cache.", state.hits),
            ("cache_misses", "Not found in the cache.", state.misses),
        ):
            family = CounterMetricFamily(f"manyeyes_{name}", text, labels=["kind"])
            for kind, count in counts.items():
                family.add_metric([kind], count)
            yield family
        yield CounterMetricFamily("manyeyes_steps", "Steps of the decoder.", state.steps)
        yield CounterMetricFamily("manyeyes_model_changes", "Versions that took over.", host.changes)
        yield CounterMetricFamily("manyeyes_model_refusals", "Versions that were refused.", host.refusals)
        info = GaugeMetricFamily("manyeyes_model", "What answers.", labels=["model", "version", "digest", "variant"])
        info.add_metric([host.name, served.version, served.digest, served.variant], 1)
        yield info
