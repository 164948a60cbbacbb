"""Both clients with one interface, so that one test checks both."""

import asyncio
from collections.abc import Generator
from typing import Any, Self

import pytest

from reparam import AsyncClient, Client, Model, Samples


class BlockingAsyncClient:
    """AsyncClient with the interface of Client."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.client = AsyncClient(*args, **settings)
        self.runner = asyncio.Runner()

    def sample(self, *args: Any, **options: Any) -> Samples:
        return self.runner.run(self.client.sample(*args, **options))

    def iter_samples(self, *args: Any, **options: Any) -> Generator[Samples, None, None]:
        batches = self.client.iter_samples(*args, **options)

        async def next_batch() -> Samples | None:
            return await anext(batches, None)

        def drain() -> Generator[Samples, None, None]:
            try:
                while batch := self.runner.run(next_batch()):
                    yield batch
            finally:
                self.runner.run(batches.aclose())

        return drain()

    def models(self) -> list[Model]:
        return self.runner.run(self.client.models())

    def model(self, name: str, version: int | None = None) -> Model:
        return self.runner.run(self.client.model(name, version))

    def __enter__(self) -> Self:
        self.runner.run(self.client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.client.__aexit__(None, None, None))
        self.runner.close()


Connect = type[Client] | type[BlockingAsyncClient]
both = pytest.mark.parametrize("connect", [Client, BlockingAsyncClient], ids=["sync", "async"])
