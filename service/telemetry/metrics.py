"""Prometheus metrics: base units, the prefix `reparam_`, one registry per application."""

import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Metrics whose value for the service is the maximum over workers. Other metrics are summed.
MAXIMA = {
    "reparam_queue_oldest_seconds", "reparam_model_served", "reparam_models_refused", "reparam_noise_version_info",
}  # fmt: skip

Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]  # name, help, type; samples: name, labels, value


class BatchNote(NamedTuple):
    """A finished batch.

    labels: model and version.
    rows: number of rows.
    closed: why the batch took no more rows; see scheduler.Closed.
    seconds: time of the run.
    waits: seconds each piece waited in the queue.
    """

    labels: tuple[str, str]
    rows: int
    closed: str
    seconds: float
    waits: Sequence[float]


class Metrics:
    """The metrics of one process.

    registry: registry of all metrics. Each other attribute is one metric, described by its help text.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ("model", "version")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"reparam_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            made = Histogram(f"reparam_{name}", text, labels, buckets)
            self.registry.register(made)
            return made

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"reparam_{name}", text, labels, registry=self.registry)

        self.requests = counter("requests", "Requests answered.", "path", "status")
        self.duration = histogram("request_duration_seconds", "From request to end of response.", SECONDS, "path")
        self.queue = histogram("queue_duration_seconds", "Time rows waited for a runner.", SECONDS, *model)
        self.infer = histogram("infer_duration_seconds", "Time of one batch.", SECONDS, *model)
        self.encode = histogram("encode_duration_seconds", "Time to encode one response.", SECONDS, "media_type")
        self.rows = counter("rows", "Rows computed.", *model)
        self.batch_rows = histogram("batch_rows", "Rows of one batch.", ROWS, *model)
        self.batches = counter("batches", "Batches, by why each took no more rows.", *model, "closed")
        self.rejected = counter("rejected", "Requests refused for want of room.", "reason")
        self.expired = counter("expired", "Requests whose deadline passed.", "stage")
        self.cancelled = counter("cancelled", "Requests whose client disconnected.", "stage")
        self.out_of_memory = counter("out_of_memory", "Runs for which the device had no memory.")
        self.in_flight = gauge("requests_in_flight", "Requests being answered.")
        self.queue_rows = gauge("queue_rows", "Rows waiting for a runner.")
        self.queue_oldest = gauge("queue_oldest_seconds", "How long the oldest waiting row has waited.")
        self.held_bytes = gauge("held_bytes", "Bytes that request bodies and responses reserve.")
        self.model_served = gauge("model_served", "1 for each model served.", *model, "provider")
        self.model_refused = gauge("models_refused", "Files and settings refused; /readyz lists them.")
        self.noise_version = gauge("noise_version_info", "Version of the noise contract.", "noise_version")

    def count_requests(self, requests: Iterable[tuple[str, int, float]]) -> None:
        """Count requests.

        requests: route, status and time in seconds of each request.
        """
        grouped: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        for route, status, seconds in requests:
            grouped[route, status].append(seconds)
        for (route, status), times in grouped.items():
            self.requests.labels(route, str(status)).inc(len(times))
            self.duration.labels(route).observe(*times)

    def count_batches(self, batches: Iterable[BatchNote]) -> None:
        """Count batches, in the metrics rows, batches, batch_rows, infer and queue."""
        grouped: defaultdict[tuple[tuple[str, str], str], list[BatchNote]] = defaultdict(list)
        for batch in batches:
            grouped[batch.labels, batch.closed].append(batch)
        for (labels, closed), together in grouped.items():
            sizes = [batch.rows for batch in together]
            self.rows.labels(*labels).inc(sum(sizes))
            self.batches.labels(*labels, closed).inc(len(sizes))
            self.batch_rows.labels(*labels).observe(*sizes)
            self.infer.labels(*labels).observe(*(batch.seconds for batch in together))
            self.queue.labels(*labels).observe(*chain.from_iterable(batch.waits for batch in together))

    def families(self) -> list[Family]:
        """Collect all metrics, without the `_created` samples of prometheus_client.

        Returns: families as plain values, which other workers receive as JSON.
        """
        return [
            (family.name, family.documentation, family.type, [
                (sample.name, sample.labels, sample.value)
                for sample in family.samples if not sample.name.endswith("_created")
            ])
            for family in self.registry.collect()
        ]  # fmt: skip


def text(workers: Iterable[list[Family]]) -> bytes:
    """Write the metrics of a service in Prometheus' text format.

    workers: the families of each worker.
    """
    return generate_latest(Sum(workers))


class Sum:
    """A Prometheus collector for the sum of the metrics of several workers; for MAXIMA, the maximum.

    workers: the families of each worker.
    """

    def __init__(self, workers: Iterable[list[Family]]) -> None:
        self._metrics: dict[str, Metric] = {}
        self._values: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
        for name, documentation, kind, samples in chain.from_iterable(workers):
            self._metrics.setdefault(name, Metric(name, documentation, kind))
            add = max if name in MAXIMA else operator.add
            for sample, labels, value in samples:
                key = name, sample, tuple(labels.items())
                self._values[key] = add(self._values.get(key, 0.0), value)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics. prometheus_client calls this method."""
        for (name, sample, labels), value in self._values.items():
            self._metrics[name].add_sample(sample, dict(labels), value)
        return self._metrics.values()


class Histogram:
    """A Prometheus histogram, ten times as fast as the histogram of prometheus_client.

    For each observation, prometheus_client takes a lock and walks along the buckets.

    labels: names of the labels.
    buckets: upper edges of the buckets, ascending, without infinity.
    """

    def __init__(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> None:
        self._about = (name, text)
        self._names = tuple(labels)
        self._buckets = buckets
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: str) -> "Series":
        """Return the series with these label values, as prometheus_client does."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Series(self._buckets)
        return series

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return the histogram. prometheus_client calls this method."""
        family = HistogramMetricFamily(*self._about, labels=self._names)
        for values, series in list(self._series.items()):
            family.add_metric(values, *series.read())
        yield family


class Series:
    """The observations of one set of label values.

    edges: upper edges of the buckets, ascending, without infinity.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, *values: float) -> None:
        """Add observations."""
        for value in values:
            self._counts[bisect_left(self._edges, value)] += 1
            self._sum += value

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Return the cumulative counts and the sum of all observations.

        Returns: each edge as text, with the number of observations up to the edge, and "+Inf" last; then the sum.
        """
        edges = [*(str(float(edge)) for edge in self._edges), "+Inf"]
        return list(zip(edges, accumulate(self._counts), strict=True)), self._sum
