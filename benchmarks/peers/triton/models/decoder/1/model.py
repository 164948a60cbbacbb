"""Triton's Python backend: https://github.com/triton-inference-server/python_backend"""

from __future__ import annotations  # the types exist only inside the server

import os
import sys

sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)  # the backend's interpreter ignores PYTHONPATH

import triton_python_backend_utils as pb_utils  # noqa: E402

from benchmarks.peers.decoder import Decoder  # noqa: E402


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.decoder = Decoder()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        tensors = [pb_utils.get_input_tensor_by_name(request, "REQUEST").as_numpy() for request in requests]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("PIXELS", pixels[None])])
            for pixels in self.decoder.sample([tuple(tensor[0].tolist()) for tensor in tensors])
        ]
