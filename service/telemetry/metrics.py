"""Prometheus metrics: base units, `reparam_` prefix, one registry an application."""

import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily

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

        self.requests = counter("requests", "Requests answered.", "path", "status")
        self.duration = histogram("request_duration_seconds", "From request to the end of its answer.", SECONDS, "path")
        self.queue = histogram("queue_duration_seconds", "Time rows waited for the runner.", SECONDS, *model)
        self.infer = histogram("infer_duration_seconds", "Time of one batch.", SECONDS, *model)
        self.encode = histogram("encode_duration_seconds", "Time to encode one answer.", SECONDS, "media_type")
        self.rows = counter("rows", "Rows computed.", *model)
        self.batch_rows = histogram("batch_rows", "Rows of one batch.", ROWS, *model)
        self.batches = counter("batches", "Batches, by why each took no more rows.", *model, "closed")
        self.rejected = counter("rejected", "Requests refused for want of room.", "reason")
        self.expired = counter("expired", "Requests whose deadline passed.", "stage")
        self.cancelled = counter("cancelled", "Requests whose client left.", "stage")
        self.out_of_memory = counter("out_of_memory", "Runs for which the device had no memory.")
        self.in_flight = 0
        self._answers: list[tuple[str, int, float]] = []
        self._batches: list[tuple[Any, str, int, float, Sequence[float]]] = []
        gauge("requests_in_flight", "Requests being answered.").set_function(lambda: self.in_flight)
        self.queue_rows = gauge("queue_rows", "Rows waiting for the runner.")
        self.queue_oldest = gauge("queue_oldest_seconds", "How long the oldest of them has waited.")
        self.held_bytes = gauge("held_bytes", "Bytes that bodies and the answers being made hold.")
        self.model_served = gauge("model_served", "1 for each model served.", *model, "provider")
        self.model_refused = gauge(
            "models_refused", "What the repository lacks or holds that cannot be served; /readyz lists it."
        )
        self.noise_version = gauge("noise_version_info", "Version of the noise contract.", "noise_version")

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Note a request."""
        self._answers.append((path, status, seconds))
        if len(self._answers) >= TOGETHER:
            self._count()

    def batch(self, batch: Any, infer: float, queue: Sequence[float]) -> None:
        """Note a batch. infer: seconds it ran; queue: seconds each of its pieces had waited."""
        self._batches.append((batch.model, batch.closed, batch.rows, infer, queue))
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
        answers: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        for path, status, seconds in self._answers:
            answers[path, status].append(seconds)
        self._answers.clear()
        for (path, status), times in answers.items():
            self.requests.labels(path, str(status)).inc(len(times))
            self.duration.labels(path).observe(*times)
        batches: defaultdict[tuple[Any, str], list[tuple[int, float, Sequence[float]]]] = defaultdict(list)
        for model, closed, rows, infer, queue in self._batches:
            batches[model, closed].append((rows, infer, queue))
        self._batches.clear()
        for (model, closed), noted in batches.items():
            labels = (model.name, str(model.version))
            sizes, runs, waits = zip(*noted, strict=True)
            self.rows.labels(*labels).inc(sum(sizes))
            self.batches.labels(*labels, closed).inc(len(sizes))
            self.batch_rows.labels(*labels).observe(*sizes)
            self.infer.labels(*labels).observe(*runs)
            self.queue.labels(*labels).observe(*chain.from_iterable(waits))


def text(workers: Iterable[list[Family]]) -> bytes:
    """What the workers of a service have counted, as Prometheus reads it."""
    return generate_latest(Sum(workers))


class Sum:
    """A collector of what several workers have counted together."""

    def __init__(self, workers: Iterable[list[Family]]) -> None:
        self._metrics: dict[str, Metric] = {}
        self._values: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
        for name, documentation, kind, samples in chain.from_iterable(workers):
            self._metrics.setdefault(name, Metric(name, documentation, kind))
            add = max if name in THE_SAME else operator.add
            for sample, labels, value in samples:
                key = name, sample, tuple(labels.items())
                self._values[key] = add(self._values.get(key, 0.0), value)

    def collect(self) -> Iterable[Metric]:
        for (name, sample, labels), value in self._values.items():
            self._metrics[name].add_sample(sample, dict(labels), value)
        return self._metrics.values()


class Histogram:
    """A Prometheus histogram without prometheus_client's locks and its walk along the buckets, which take ten times as
    long."""

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
    """The observations under one set of labels."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, *values: float) -> None:
        for value in values:
            self._counts[bisect_left(self._edges, value)] += 1
            self._sum += value

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """The cumulative count up to each edge, and the sum of all."""
        edges = [*(str(float(edge)) for edge in self._edges), "+Inf"]
        return list(zip(edges, accumulate(self._counts), strict=True)), self._sum
