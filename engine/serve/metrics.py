"""Prometheus metrics of /metrics: of requests, counted by the ingress, and of replicas, from the stats that they return.

Replicas are other processes, and come and go. The ingress polls all of them when it is scraped, so that there is one
address to scrape; a replica's counters start at 0 with it, as Prometheus expects of a series. Where there are several
ingresses, whichever is scraped collects the metrics of all, labeled with the ingress' number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.serve.jobs import Timings

LABELS = ["model", "version", "key"]
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
# Key of a replica's stats -> name and help of its metric; names in _total are counters.
REPLICA_METRICS = {
    "waiting": ("manta_replica_waiting", "sequences that wait for a slot"),
    "running": ("manta_replica_running", "sequences in the batch"),
    "cached_tokens": ("manta_replica_cached_tokens", "tokens of running sequences in the KV cache"),
    "cache_tokens": ("manta_replica_cache_tokens", "capacity of the KV cache in tokens"),
    "steps": ("manta_replica_forwards_total", "forward passes"),
    "by_lanes": (
        "manta_replica_lane_requests_total",
        "requests that an ingress on the same node sent by socket (engine/serve/routing/ipc.py)",
    ),
    "rows": ("manta_replica_rows_total", "sequences in all forward passes; divided by these: the mean batch size"),
    "guessed_tokens": ("manta_replica_guessed_tokens_total", "draft tokens proposed (serve.num_speculative_tokens)"),
    "right_tokens": ("manta_replica_right_tokens_total", "draft tokens accepted"),
    "draft_forwards": ("manta_replica_draft_forwards_total", "forward passes of the draft model (serve.draft_model)"),
    "adapters": ("manta_replica_adapters", "LoRA adapters in memory"),
    "adapter_loads": (
        "manta_replica_adapter_loads_total",
        "loads of adapters: if far more than there are adapters, serve.max_adapters is too small",
    ),
    "reused_tokens": ("manta_replica_reused_tokens_total", "prompt tokens found in the prefix cache"),
}


class Metrics:
    """All metrics of an ingress."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "manta_requests",
            "requests by status; 499: the client hung up",
            ["path", *LABELS, "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge("manta_requests_in_flight", "requests in flight", registry=self.registry)
        self.latency = self._histogram(
            "manta_request_seconds", "time to the end of the response", ["path", *LABELS], LATENCY_BUCKETS_S
        )
        self.queue_time = self._histogram(
            "manta_queue_seconds", "time that a sequence waited for a slot", LABELS, LATENCY_BUCKETS_S
        )
        self.first_token_time = self._histogram(
            "manta_first_token_seconds", "time from queue to first token", LABELS, LATENCY_BUCKETS_S
        )
        self.inter_token_time = self._histogram(
            "manta_between_tokens_seconds",
            "time between two tokens, mean of a sequence",
            LABELS,
            TOKEN_LATENCY_BUCKETS_S,
        )
        self.tokens = Counter(
            "manta_tokens", "tokens by kind: prompt, cached (of these, found in the prefix cache), completion",
            [*LABELS, "kind"], registry=self.registry,
        )  # fmt: skip
        self.feedback = Counter(
            "manta_feedback", "ratings of responses", ["model", "version", "rating"], registry=self.registry
        )
        self.records = Counter("manta_records_failed", "records that could not be written", ["kind"], registry=self.registry)  # fmt: skip
        self.replica_stats: dict[str, list[dict[str, Any]]] = {}  # model -> the latest stats of its replicas

    def count_tokens(self, labels: tuple[str, str, str], *, prompt: int, cached: int, completion: int) -> None:
        """Count the tokens of a request."""
        for kind, count in (("prompt", prompt), ("cached", cached), ("completion", completion)):
            self.tokens.labels(*labels, kind).inc(count)

    def observe_timings(self, labels: tuple[str, str, str], timings: Timings) -> None:
        """Observe the latencies of a finished sequence."""
        self.queue_time.labels(*labels).observe(timings.queue_s)
        if timings.first_token_s is not None:
            self.first_token_time.labels(*labels).observe(timings.first_token_s)
        if timings.inter_token_s is not None:
            self.inter_token_time.labels(*labels).observe(timings.inter_token_s)

    def _histogram(self, name: str, description: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, description, labels, buckets=buckets, registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of replicas."""
        num_replicas = GaugeMetricFamily("manta_replicas", "replicas that answer", labels=["model", "version"])
        counts: dict[tuple[str, str], int] = {}
        for model, replicas in self.replica_stats.items():
            for stats in replicas:
                labels = (model, stats["version"])
                counts[labels] = counts.get(labels, 0) + 1
        for labels, count in counts.items():
            num_replicas.add_metric(labels, count)
        yield num_replicas
        for key, (name, description) in REPLICA_METRICS.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(name, description, labels=["model", "version", "replica"])
            for model, replicas in self.replica_stats.items():
                for stats in replicas:
                    if key in stats:
                        metric.add_metric([model, stats["version"], stats["replica"]], stats[key])
            yield metric

    def local_metrics(self) -> list[Metric]:
        """Return the metrics that this ingress has counted."""
        return list(self.registry.collect())

    def exposition(self, ingresses: Mapping[int, Sequence[Metric]] | None = None) -> str:
        """Return Prometheus' text format: of the replicas, and of this ingress or of several by their numbers."""
        requests = self.local_metrics() if ingresses is None else merge_ingresses(ingresses)
        return generate_latest(MetricList([*requests, *self.collect()])).decode()


@dataclass(frozen=True)
class MetricList:
    """A collector of given metrics, as prometheus_client takes it."""

    metrics: list[Metric]

    def collect(self) -> list[Metric]:
        """Return the metrics."""
        return self.metrics


def merge_ingresses(ingresses: Mapping[int, Sequence[Metric]]) -> list[Metric]:
    """Return the metrics of several ingresses, each sample labeled with its ingress' number."""
    merged: dict[str, Metric] = {}
    for number, metrics in sorted(ingresses.items()):
        for metric in metrics:
            family = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for sample in metric.samples:
                family.add_sample(
                    sample.name,
                    sample.labels | {"ingress": str(number)},
                    sample.value,
                    sample.timestamp,
                    sample.exemplar,
                )
    return list(merged.values())
