"""Prometheus metrics: base units, `reparam_` prefix, one registry an application."""

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from service.noise import NOISE_VERSION
from service.scheduler import Batch

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOGETHER = 256  # requests, or batches, that are counted
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Of these each worker says the same, or the oldest counts; all others are added up.
THE_SAME = {
    "reparam_queue_oldest_seconds", "reparam_model_served", "reparam_models_refused", "reparam_noise_version_info",
}  # fmt: skip

Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]  # name, help, type; samples with their labels


class Metrics:
    """Requests and batches are noted, and counted many together or when somebody asks: then the next request finds in
    the caches what it needs, not what counts the last."""

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

        def tally(name: str, text: str, *labels: str) -> Tally:
            made = Tally(f"reparam_{name}", text, labels)
            self.registry.register(made)
            return made

        self.requests = tally("requests", "Requests answered.", "path", "status")
        self.duration = histogram("request_duration_seconds", "From request to the end of its answer.", SECONDS, "path")
        self.queue = histogram("queue_duration_seconds", "Time rows waited for the runner.", SECONDS, *model)
        self.infer = histogram("infer_duration_seconds", "Time of one batch.", SECONDS, *model)
        self.encode = histogram("encode_duration_seconds", "Time to encode one answer.", SECONDS, "media_type")
        self.rows = tally("rows", "Rows computed.", *model)
        self.batch_rows = histogram("batch_rows", "Rows of one batch.", ROWS, *model)
        self.batches = tally("batches", "Batches, by why each took no more rows.", *model, "closed")
        self.rejected = counter("rejected", "Requests refused for want of room.", "reason")
        self.expired = counter("expired", "Requests whose deadline passed.", "stage")
        self.cancelled = counter("cancelled", "Requests whose client left.", "stage")
        self.out_of_memory = counter("out_of_memory", "Runs for which the device had no memory.")
        self.in_flight = 0
        self._answers: list[tuple[str, int, float]] = []
        self._batches: list[tuple[Any, int, str, float, Sequence[float]]] = []
        gauge("requests_in_flight", "Requests being answered.").set_function(lambda: self.in_flight)
        self.queue_rows = gauge("queue_rows", "Rows waiting for the runner.")
        self.queue_oldest = gauge("queue_oldest_seconds", "How long the oldest of them has waited.")
        self.held_bytes = gauge("held_bytes", "Bytes that bodies and the answers being made hold.")
        self.model_served = gauge("model_served", "1 for each model served.", *model, "provider")
        self.model_refused = gauge(
            "models_refused", "What the repository lacks or holds that cannot be served; /readyz lists it."
        )
        gauge("noise_version_info", "Version of the noise contract.", "noise_version").labels(str(NOISE_VERSION)).set(1)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Note a request."""
        self._answers.append((path, status, seconds))
        if len(self._answers) >= TOGETHER:
            self._count()

    def batch(self, batch: Batch[Any], infer: float, queue: Sequence[float]) -> None:
        """Note a batch. infer: seconds it ran; queue: seconds each of its pieces had waited."""
        self._batches.append((batch.model, batch.rows, batch.closed, infer, queue))
        if len(self._batches) >= TOGETHER:
            self._count()

    def families(self) -> list[Family]:
        """What is counted so far, without the times since when."""
        self._count()
        return [
            (family.name, family.documentation, family.type, [
                (sample.name, sample.labels, sample.value)
                for sample in family.samples if not sample.name.endswith("_created")
            ])
            for family in self.registry.collect()
        ]  # fmt: skip

    def _count(self) -> None:
        for path, status, seconds in self._answers:
            self.requests.counts[path, status] += 1
            self.duration.labels(path).observe(seconds)
        self._answers.clear()
        for model, rows, closed, infer, queue in self._batches:
            labels = (model.name, str(model.version))
            self.rows.counts[labels] += rows
            self.batches.counts[*labels, closed] += 1
            self.batch_rows.labels(*labels).observe(rows)
            self.infer.labels(*labels).observe(infer)
            self.queue.labels(*labels).observe(*queue)
        self._batches.clear()


def text(workers: Iterable[list[Family]]) -> bytes:
    """What the workers of a service have counted, as Prometheus reads it."""
    return generate_latest(Sum(workers))


class Sum:
    """A collector of what several workers have counted together."""

    def __init__(self, workers: Iterable[list[Family]]) -> None:
        self._metrics: dict[str, Metric] = {}
        self._values: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
        for name, documentation, kind, samples in itertools.chain.from_iterable(workers):
            self._metrics.setdefault(name, Metric(name, documentation, kind))
            add = max if name in THE_SAME else operator.add
            for sample, labels, value in samples:
                key = name, sample, tuple(labels.items())
                self._values[key] = add(self._values.get(key, 0.0), value)

    def collect(self) -> Iterable[Metric]:
        for (name, sample, labels), value in self._values.items():
            self._metrics[name].add_sample(sample, dict(labels), value)
        return self._metrics.values()


class Tally:
    """A Prometheus counter that is an integer: for what happens at each request, prometheus_client's own is slow."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._about = (name, text)
        self._names = tuple(labels)
        self.counts: defaultdict[tuple[str | int, ...], int] = defaultdict(int)

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(*self._about, labels=self._names)
        for values, count in sorted(self.counts.items()):
            family.add_metric([str(value) for value in values], count)
        yield family


class Histogram:
    """A Prometheus histogram that is counted when it is read: to observe costs an append, a tenth of what it does with
    prometheus_client's own."""

    def __init__(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> None:
        self._about = (name, text)
        self._names = tuple(labels)
        self._buckets = buckets
        self._series: dict[tuple[str, ...], Series] = {}

    def labels(self, *values: str) -> "Series":
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Series(self._buckets)
        return series

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(*self._about, labels=self._names)
        for values, series in list(self._series.items()):
            family.add_metric(values, *series.read())
        yield family


class Series:
    """The observations under one set of labels; for one thread."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._edges = np.array(buckets, np.float64)
        self._counts = np.zeros(len(buckets) + 1, np.int64)
        self._sum = 0.0
        self._new: list[float] = []

    def observe(self, *values: float) -> None:
        self._new += values
        if len(self._new) >= 4096:
            self._count()

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """The cumulative count up to each edge, and the sum of all."""
        self._count()
        edges = [*map(str, self._edges.tolist()), "+Inf"]
        return list(zip(edges, self._counts.cumsum().tolist(), strict=True)), self._sum

    def _count(self) -> None:
        values = np.array(self._new)
        self._new.clear()
        self._sum += float(values.sum())
        self._counts += np.bincount(np.searchsorted(self._edges, values), minlength=len(self._counts))
