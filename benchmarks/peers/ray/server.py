"""Ray Serve with dynamic batching: https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html"""

import os

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers.decoder import Decoder


@serve.deployment(num_replicas=2, max_ongoing_requests=256)  # the default of 5 would leave no batches
class Sampler:
    def __init__(self) -> None:
        self.decoder = Decoder()

    async def __call__(self, request: Request) -> Response:
        body = await request.json()
        pixels = await self.sample((body["seed"], body["rows"]))
        return Response(pixels.tobytes(), media_type="application/octet-stream")

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0)
    async def sample(self, requests: list[tuple[int, int]]) -> list[np.ndarray]:
        return self.decoder.sample(requests)


if __name__ == "__main__":
    # Ten times as fast here: https://docs.ray.io/en/master/kuberay/user-guides/serve-high-throughput.html
    os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"])}, logging_config={"enable_access_log": False}
    )
    serve.run(Sampler.bind(), route_prefix="/", blocking=True)  # type: ignore[attr-defined]  # the decorator adds it
