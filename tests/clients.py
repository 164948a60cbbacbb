"""Both clients behind one face, so that every fact is checked on both."""

import asyncio
from collections.abc import Generator
from typing import Any, Self

import pytest

from reparam import AsyncClient, Client, Model, Samples


class Awaited:
    """AsyncClient with the face of Client."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.client = AsyncClient(*args, **settings)
        self.runner = asyncio.Runner()

    def sample(self, *args: Any, **options: Any) -> Samples:
        return self.runner.run(self.client.sample(*args, **options))

    def iter_samples(self, *args: Any, **options: Any) -> Generator[Samples, None, None]:
        batches = self.client.iter_samples(*args, **options)

        async def following() -> Samples | None:
            return await anext(batches, None)

        def drain() -> Generator[Samples, None, None]:
            try:
                while batch := self.runner.run(following()):
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


Connect = type[Client] | type[Awaited]
both = pytest.mark.parametrize("connect", [Client, Awaited], ids=["sync", "async"])
