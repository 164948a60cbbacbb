"""LitServe with batching: https://lightning.ai/docs/litserve/features/batching"""

import os
from typing import Any

import litserve
import numpy as np
from starlette.responses import Response

from benchmarks.peers.decoder import Decoder


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.decoder = Decoder()

    def decode_request(self, request: dict[str, Any]) -> tuple[int, int]:
        return request["seed"], request["rows"]

    def batch(self, inputs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return inputs  # the decoder concatenates the requests

    def predict(self, batch: list[tuple[int, int]]) -> list[np.ndarray]:
        return self.decoder.sample(batch)

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")  # raw bytes instead of JSON


if __name__ == "__main__":
    # The fastest of batch_timeout 0, 2 and 5 ms, 1 and 2 workers, 1 and 2 API servers, and both queues.
    api = Api(max_batch_size=64, batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=False)
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        log_level="critical",
        access_log=False,
        generate_client_file=False,
    )
