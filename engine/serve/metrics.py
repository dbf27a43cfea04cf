"""What /metrics tells, for Prometheus: of requests as the ingress sees them, and of replicas as they say themselves.

Replicas are other processes, and come and go. The ingress asks all of them when it is asked itself, so that there is one
address to scrape; a counter of a replica begins anew with it, as Prometheus expects of a series. So it is with other
ingresses, where there are some: each one's series bear its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

WHO = ["model", "version", "key"]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
# Figure of a replica -> its metric, and what it is. A name in _total is a counter, and ends so when it is told.
REPLICA = {
    "waiting": ("manta_replica_waiting", "completions that wait for a place"),
    "running": ("manta_replica_running", "completions that share the forwards"),
    "cached_tokens": ("manta_replica_cached_tokens", "tokens of running completions in the key/value cache"),
    "cache_tokens": ("manta_replica_cache_tokens", "tokens that the cache has room for"),
    "steps": ("manta_replica_forwards_total", "forwards run"),
    "by_lanes": (
        "manta_replica_lane_requests_total",
        "requests that an ingress on the same node sent by the short way (engine/serve/routing/ipc.py)",
    ),
    "rows": ("manta_replica_rows_total", "sequences in all forwards: over the forwards, the mean batch"),
    "guessed_tokens": ("manta_replica_guessed_tokens_total", "tokens guessed ahead (serve.num_speculative_tokens)"),
    "right_tokens": ("manta_replica_right_tokens_total", "of these, tokens that the model would have written itself"),
    "draft_forwards": ("manta_replica_draft_forwards_total", "forwards of the draft (serve.draft_model)"),
    "adapters": ("manta_replica_adapters", "LoRA adapters in memory"),
    "adapter_loads": (
        "manta_replica_adapter_loads_total",
        "adapters loaded: many more than there are, and serve.max_adapters is small",
    ),
    "reused_tokens": ("manta_replica_reused_tokens_total", "tokens of prompts that were in the cache already"),
}


class Metrics:
    """All metrics of an ingress."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "manta_requests",
            "requests answered; 499: the client left",
            ["path", *WHO, "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge("manta_requests_in_flight", "requests being answered", registry=self.registry)
        self.seconds = self._histogram("manta_request_seconds", "time to the whole answer", ["path", *WHO], SECONDS)
        self.times = {  # of a completion
            "queued": self._histogram("manta_queue_seconds", "time that a completion waited for a place", WHO, SECONDS),
            "first": self._histogram("manta_first_token_seconds", "time from queue to first token", WHO, SECONDS),
            "between": self._histogram(
                "manta_between_tokens_seconds", "time between two tokens, a completion's mean", WHO, TOKEN_SECONDS
            ),
        }
        self.tokens = Counter(
            "manta_tokens", "tokens by kind: prompt (read), cached (of these, not read again), completion (written)",
            [*WHO, "kind"], registry=self.registry,
        )  # fmt: skip
        self.feedback = Counter(
            "manta_feedback", "answers rated", ["model", "version", "rating"], registry=self.registry
        )
        self.records = Counter("manta_records_failed", "records that could not be written", ["kind"], registry=self.registry)  # fmt: skip
        self.replicas: dict[str, list[dict[str, Any]]] = {}  # model -> what its replicas said last

    def _histogram(self, name: str, told: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, told, labels, buckets=buckets, registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the replicas' figures."""
        up = GaugeMetricFamily("manta_replicas", "replicas that answer", labels=["model", "version"])
        counts: dict[tuple[str, str], int] = {}
        for model, said in self.replicas.items():
            for figures in said:
                place = (model, figures["version"])
                counts[place] = counts.get(place, 0) + 1
        for place, count in counts.items():
            up.add_metric(place, count)
        yield up
        for figure, (name, told) in REPLICA.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(name, told, labels=["model", "version", "replica"])
            for model, said in self.replicas.items():
                for figures in said:
                    if figure in figures:
                        metric.add_metric([model, figures["version"], figures["replica"]], figures[figure])
            yield metric

    def own(self) -> list[Metric]:
        """Return what this ingress has counted itself."""
        return list(self.registry.collect())

    def page(self, ingresses: Mapping[int, Sequence[Metric]] | None = None) -> str:
        """Return Prometheus's text: of the replicas, and of this ingress or of these, by their numbers."""
        counted = self.own() if ingresses is None else beside(ingresses)
        return generate_latest(Collected([*counted, *self.collect()])).decode()


@dataclass(frozen=True)
class Collected:
    """Metrics as prometheus_client takes them."""

    metrics: list[Metric]

    def collect(self) -> list[Metric]:
        """Return them."""
        return self.metrics


def beside(ingresses: Mapping[int, Sequence[Metric]]) -> list[Metric]:
    """Return the metrics of several ingresses, each sample with the number of its own as a label."""
    found: dict[str, Metric] = {}
    for number, metrics in sorted(ingresses.items()):
        for metric in metrics:
            whole = found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for it in metric.samples:
                whole.add_sample(it.name, it.labels | {"ingress": str(number)}, it.value, it.timestamp, it.exemplar)
    return list(found.values())
