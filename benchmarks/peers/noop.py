"""The limit of the HTTP layer: uvicorn with default settings, and an application with a fixed response."""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import uvicorn

# The header of an npy file, with the length of Reparam's header.
HEADER = np.lib.format.magic(1, 0) + bytes(118)
ANSWERS = {rows: HEADER + bytes(784 * rows) for rows in (1, 64)}


App = Callable[..., Awaitable[None]]


def answering(answer: Callable[[int], bytes]) -> App:
    """An ASGI application.

    answer: function from the number of rows, 1 or 64, to the body.
    """

    async def app(
        scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        message = await receive()
        body = answer(64 if b'"n":64' in message["body"] else 1)
        headers = [(b"content-type", b"application/x-npy"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def serve(app: App) -> None:
    uvicorn.run(
        app, port=int(os.environ["PORT"]), log_config=None, access_log=False, server_header=False, lifespan="off"
    )


if __name__ == "__main__":
    serve(answering(ANSWERS.__getitem__))
