"""BentoML with adaptive batching: https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html"""

from base64 import b64encode

import bentoml

from benchmarks.peers import decoder


@bentoml.service(workers=2, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class Decoder:
    def __init__(self) -> None:
        self.decoder = decoder.Decoder()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=60_000)
    def sample(self, requests: list[tuple[int, int]]) -> list[str]:
        # A batchable API returns a list as JSON, and base64 is smaller than numbers. Raw bytes need a second service in
        # front (bentoml.depends); the hop between processes costs more than raw bytes save.
        return [b64encode(pixels.tobytes()).decode() for pixels in self.decoder.sample(requests)]
