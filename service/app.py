"""The application: its operations and its routes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from reparam._version import __version__
from reparam.service.http.endpoint import Endpoint
from reparam.service.http.middleware import RequestMiddleware, refuse_by_router
from reparam.service.http.openapi import add_operations
from reparam.service.http.routes import add_models, add_probes, add_problems
from reparam.service.lifespan import Lifespan
from reparam.service.operations import OPERATIONS
from reparam.service.operations.operation import Operation
from reparam.service.settings import Settings
from reparam.service.telemetry.reports import WorkerReports
from reparam.service.wire.fast_path import FastPath


def create_app(
    settings: Settings | None = None,
    reports: WorkerReports | None = None,
    operations: Sequence[Operation] = OPERATIONS,
) -> "Application":
    """Make the application, also for `uvicorn --factory reparam.service.app:create_app`.

    settings: settings of the service; default: settings from the environment.
    reports: exchange of reports between the workers of the service; None for a single process.
    operations: operations to serve, each at `POST <path>`.

    Returns: the application. The models load when the application starts.

    Raises: DeviceError; pydantic.ValidationError for wrong settings in the environment.
    """
    lifespan = Lifespan(Settings() if settings is None else settings, reports)
    app = Application(lifespan, operations)
    add_models(app, lifespan)
    add_probes(app, lifespan)
    add_problems(app)
    return app


class Application(FastAPI):
    """A FastAPI application. Requests for operations bypass FastAPI's middleware and routing.

    FastAPI's middleware and routing take longer than all other steps of a sample.

    reparam: the lifespan, with models, engine and state.
    fast_paths: fast paths of the operations, by path; used by `wire/` alone.
    """

    def __init__(self, lifespan: Lifespan, operations: Sequence[Operation]) -> None:
        super().__init__(
            title="Reparam",
            version=__version__,
            description="Samples of trained variational autoencoders, reproducible to the row.",
            lifespan=lifespan.run,
            redirect_slashes=False,
            redoc_url=None,
        )
        settings = lifespan.settings
        api_key = settings.api_key.get_secret_value() if settings.api_key else None
        wrap = partial(RequestMiddleware, recorder=lifespan.recorder, api_key=api_key)
        self.reparam = lifespan
        self.fast_paths: dict[str, FastPath] = {}
        self._operations = operations
        self._has_key = api_key is not None
        self._direct: dict[str, tuple[Route, RequestMiddleware]] = {}
        for operation in operations:
            endpoint = Endpoint(operation, lifespan)
            route = Route(operation.path, endpoint, methods=["POST"])
            self.router.routes.append(route)
            self._direct[operation.path] = route, wrap(endpoint)
            self.fast_paths[operation.path] = FastPath(endpoint, lifespan.recorder, api_key)
        self.add_middleware(RequestMiddleware, recorder=lifespan.recorder, api_key=api_key)
        self.add_exception_handler(HTTPException, refuse_by_router)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an ASGI connection. A POST to an operation's path goes straight to the operation."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._direct:
            scope["route"], application = self._direct[scope["path"]]
            await application(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI schema, including the operations."""
        if self.openapi_schema is None:
            add_operations(super().openapi(), self._operations, self._has_key)
        return super().openapi()
