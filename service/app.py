"""The FastAPI application: its routes."""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from reparam._version import __version__
from reparam.service.artifact.file import VERSION
from reparam.service.errors import PROBLEMS, Unavailable, UnknownPath, clipped
from reparam.service.http import openapi as schema
from reparam.service.http.endpoint import Sampling
from reparam.service.http.middleware import OPEN, Edge, refused_by_router
from reparam.service.lifespan import STATES, Service
from reparam.service.runtime.repository import Model
from reparam.service.settings import Settings
from reparam.service.telemetry.metrics import text
from reparam.service.telemetry.reports import Siblings
from reparam.service.wire.fast_path import ShortWay

Handler = Callable[..., Coroutine[Any, Any, Response]]


class Application(FastAPI):
    """FastAPI, but `POST /sample` goes straight to its ASGI application: the middleware and routing of FastAPI take
    longer than all else that a sample needs."""

    def __init__(self, service: Service) -> None:
        super().__init__(
            title="Reparam",
            version=__version__,
            description="Samples of trained variational autoencoders, reproducible to the row.",
            lifespan=service.running,
            redirect_slashes=False,
            redoc_url=None,
        )
        settings = service.settings
        edge = partial(
            Edge,
            metrics=service.metrics,
            api_key=settings.api_key.get_secret_value() if settings.api_key else None,
            access_log=service.access_log,
        )
        sampling = Sampling(service)
        self.sample = Route("/sample", sampling, methods=["POST"])
        self.direct = edge(sampling)
        self.short = ShortWay(self.sample.path, self.direct, sampling)
        self.router.routes.append(self.sample)
        self.add_middleware(edge)
        self.add_exception_handler(HTTPException, refused_by_router)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        if scope["type"] == "http" and scope["path"] == self.sample.path and scope["method"] == "POST":
            scope["route"] = self.sample
            return self.direct(scope, receive, send)
        return super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """And says what `/sample` is, and who asks for the key."""
        if self.openapi_schema is None:
            described = super().openapi()
            described["paths"] |= {self.sample.path: {"post": schema.SAMPLE}}
            described["components"]["schemas"] |= schema.SCHEMAS
            if self.direct.api_key:
                described["components"] |= schema.KEY
                for path, operations in described["paths"].items():
                    if not path.startswith(OPEN):
                        operations |= {method: {**said, **schema.WITH_KEY} for method, said in operations.items()}
        return super().openapi()


def create_app(settings: Settings, siblings: Siblings | None = None) -> FastAPI:
    """The application for these settings. Raises DeviceError."""
    service = Service(settings, siblings)
    app = Application(service)
    app.state.service = service
    _add_models(app, service)
    _add_probes(app, service)

    @_get(app, "/problems/{slug}", **schema.PROBLEM)
    async def problem(slug: str) -> PlainTextResponse:
        if slug not in PROBLEMS:
            raise UnknownPath(f"no problem type {clipped(slug)!r}; there are: {', '.join(PROBLEMS)}")
        return PlainTextResponse(f"{PROBLEMS[slug].status} {slug}\n\n{PROBLEMS[slug].meaning}\n")

    return app


def _get(app: FastAPI, path: str, **said: Any) -> Callable[[Handler], Handler]:
    """A route of GET, and of HEAD, which HTTP wants beside it (RFC 9110, section 9.1)."""

    def add(handler: Handler) -> Handler:
        app.head(path, include_in_schema=False)(handler)
        return app.get(path, **said)(handler)

    return add


def _add_models(app: FastAPI, service: Service) -> None:
    @_get(app, "/models", **schema.MODELS)
    async def models() -> JSONResponse:
        service.ready()
        served = [_describe(service, model) for model in service.served()]
        return JSONResponse({"default": service.repository.default_name(), "models": served})

    @_get(app, "/models/{name}", **schema.MODEL)
    async def model(name: str) -> JSONResponse:
        service.ready()
        return JSONResponse(_describe(service, service.repository.find(name, None)))

    @_get(app, "/models/{name}/versions/{version}", **schema.MODEL_VERSION)
    async def model_version(name: str, version: str) -> JSONResponse:
        service.ready()
        if not VERSION.fullmatch(version):
            raise UnknownPath(
                f"a version is a whole number of at least 1, not {clipped(version)!r}; see /models/{clipped(name)}"
            )
        return JSONResponse(_describe(service, service.repository.find(name, int(version))))


def _add_probes(app: FastAPI, service: Service) -> None:
    """What those ask who watch the service."""

    @_get(app, "/livez", **schema.LIVEZ)
    async def livez() -> JSONResponse:
        for report in await service.reports():
            if report.failure is not None:
                return JSONResponse({"status": "failed", "failure": report.failure}, 503)
        return JSONResponse({"status": "alive"})

    @_get(app, "/readyz", **schema.READYZ)
    async def readyz() -> JSONResponse:
        states = {report.state for report in await service.reports()}
        status = min(states, key=STATES.index)
        body = {"status": status, "models": service.repository.available(), "refused": service.repository.refused}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @_get(app, "/metrics", **schema.METRICS)
    async def metrics() -> Response:
        reports = await service.reports()
        counted = [report.metrics for report in reports if report.metrics is not None]
        if len(counted) < len(reports):
            raise Unavailable("a worker does not answer, and without it the sums are wrong: see /livez", retry_after=1)
        return Response(text(counted), media_type="text/plain; version=0.0.4; charset=utf-8")


def _describe(service: Service, model: Model) -> dict[str, Any]:
    contract = model.contract
    return {
        "name": model.name,
        "version": model.version,
        "versions": sorted(service.repository.models[model.name]),
        "kind": contract.kind,
        "latent_shape": contract.latent_shape,
        "image_shape": contract.image_shape,
        "default_temperature": contract.default_temperature,
        "precision": contract.precision,
        "noise_version": contract.noise_version,
        "parameters": contract.traits.parameters,
        "priors": contract.priors,
        "outputs": contract.traits.outputs,
        "trained_on": contract.trained_on,
        "evaluation": contract.evaluation,
        "provider": model.artifact.provider,
        "bytes": model.artifact.size,
    }
