"""The decoder of every peer: noise from the request's seed, and one run for all rows of a batch."""

import os
from collections.abc import Sequence

import numpy as np
import onnxruntime

LATENT = 20
MAX_ROWS = 64 * 64  # 64 requests in a batch, of 64 rows at most


class Decoder:
    """The model file in $MODEL, sampled from its prior at temperature 1."""

    def __init__(self, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.zeros = np.zeros((MAX_ROWS, LATENT), np.float32)
        self.ones = np.ones(MAX_ROWS, np.float32)

    def sample(self, requests: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Sample several requests in one run of the model.

        requests: (seed, rows) of each request.

        Returns: pixels of each request, uint8 (rows, 784).
        """
        noise = [np.random.default_rng(seed).standard_normal((rows, LATENT), np.float32) for seed, rows in requests]
        ends = np.cumsum([len(rows) for rows in noise])
        return np.split(self.pixels(np.concatenate(noise)), ends[:-1])

    def pixels(self, noise: np.ndarray) -> np.ndarray:
        """Pixels, uint8 (n, 784), for noise float32 (n, LATENT)."""
        rows = len(noise)
        prior = {"mu": self.zeros[:rows], "log_var": self.zeros[:rows], "temperature": self.ones[:rows]}
        pixels: np.ndarray
        (pixels,) = self.session.run(["pixels"], {"noise": noise, **prior})
        return pixels.reshape(rows, -1)
