"""A minimal service in FastAPI: a route with validated JSON, and a fixed response as in noop."""

from typing import Annotated, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from benchmarks.peers.noop import ANSWERS, serve


class Request(BaseModel):
    n: Literal[1, 64]
    seed: Annotated[int, Field(ge=0, lt=2**64)]


app = FastAPI()


@app.post("/")
async def sample(request: Request) -> Response:
    return Response(ANSWERS[request.n], media_type="application/x-npy")


if __name__ == "__main__":
    serve(app)
