"""The limit of the model: onnxruntime without a server. python -m benchmarks.peers.alone ROWS THREADS SECONDS"""

import json
import sys
import time

import numpy as np

from benchmarks.peers.decoder import LATENT, Decoder


def main(rows: int, threads: int, seconds: float) -> None:
    decoder = Decoder(threads)
    noise = np.random.default_rng(0).standard_normal((rows, LATENT), np.float32)
    for _ in range(100):
        decoder.pixels(noise)
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        decoder.pixels(noise)
        times.append(time.perf_counter() - start)
    print(json.dumps({"rows_per_second": rows * len(times) / sum(times), "p50": float(np.median(times))}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
