"""The limit of a lone request: as noop, but the answer is the model's, run once on the event loop, always on the same
noise."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import uvicorn

from benchmarks.peers.decoder import LATENT, Decoder
from benchmarks.peers.noop import HEADER

decoder = Decoder()
NOISE = {rows: np.zeros((rows, LATENT), np.float32) for rows in (1, 64)}


async def app(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    message = await receive()
    answer = HEADER + decoder.pixels(NOISE[64 if b'"n":64' in message["body"] else 1]).tobytes()
    headers = [(b"content-type", b"application/x-npy"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


if __name__ == "__main__":
    uvicorn.run(
        app, port=int(os.environ["PORT"]), log_config=None, access_log=False, server_header=False, lifespan="off"
    )
