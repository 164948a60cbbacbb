"""Prometheus metrics: base units, `reparam_` prefix, one registry an application."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.noise import NOISE_VERSION
from service.repository import Model

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ("model", "version")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"reparam_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"reparam_{name}", text, labels, buckets=buckets, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"reparam_{name}", text, labels, registry=self.registry)

        self.requests = counter("requests", "Requests answered.", "path", "status")
        self.duration = histogram("request_duration_seconds", "From request to the end of its answer.", SECONDS, "path")
        self.queue = histogram("queue_duration_seconds", "Time rows waited for the runner.", SECONDS, *model)
        self.infer = histogram("infer_duration_seconds", "Time of one run of a model.", SECONDS, *model)
        self.encode = histogram("encode_duration_seconds", "Time to encode one answer.", SECONDS, "media_type")
        self.rows = counter("rows", "Rows computed.", *model)
        self.batch_rows = histogram("batch_rows", "Rows of one run of a model.", ROWS, *model)
        self.rejected = counter("rejected", "Requests refused for want of room.", "reason")
        self.expired = counter("expired", "Requests whose deadline passed.", "stage")
        self.in_flight = gauge("requests_in_flight", "Requests being answered.")
        self.queue_rows = gauge("queue_rows", "Rows waiting for the runner.")
        self.model_served = gauge("model_served", "1 for each model served.", *model, "provider")
        self.model_refused = gauge("models_refused", "Files in the repository that break the contract.")
        gauge("noise_version_info", "Version of the noise contract.", "noise_version").labels(str(NOISE_VERSION)).set(1)

    def batch(self, model: Model, rows: int, infer: float, queue: list[float]) -> None:
        labels = (model.name, str(model.version))
        self.rows.labels(*labels).inc(rows)
        self.batch_rows.labels(*labels).observe(rows)
        self.infer.labels(*labels).observe(infer)
        for seconds in queue:
            self.queue.labels(*labels).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
