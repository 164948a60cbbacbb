"""The FastAPI application: its routes."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from service import __version__, schema
from service.edge import Edge, refused_by_router
from service.errors import PROBLEMS, UnknownPath
from service.life import Service
from service.repository import Model
from service.sampling import sample
from service.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings. Raises DeviceError."""
    service = Service(settings)
    app = FastAPI(
        title="Reparam",
        version=__version__,
        description="Samples of trained variational autoencoders, reproducible to the row.",
        lifespan=service.running,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.service = service
    key = settings.api_key.get_secret_value() if settings.api_key else None
    app.add_middleware(Edge, metrics=service.metrics, api_key=key)
    app.add_exception_handler(HTTPException, refused_by_router)

    @app.post("/sample", **schema.SAMPLE)
    async def sample_route(request: Request) -> Response:
        return await sample(service, request)

    @app.get("/models", **schema.MODELS)
    async def models() -> JSONResponse:
        service.ready()
        served = [_describe(service, model) for model in service.served()]
        return JSONResponse({"default": service.repository.default_name(), "models": served})

    @app.get("/models/{name}", **schema.MODEL)
    async def model(name: str) -> JSONResponse:
        service.ready()
        return JSONResponse(_describe(service, service.repository.find(name, None)))

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", **schema.LIVEZ)
    async def livez() -> JSONResponse:
        failure = service.failure()
        if failure is None:
            return JSONResponse({"status": "alive"})
        return JSONResponse({"status": "failed", "failure": repr(failure)}, 503)

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", **schema.READYZ)
    async def readyz() -> JSONResponse:
        versions = {name: sorted(known) for name, known in sorted(service.repository.models.items())}
        status = "failed" if service.failure() else service.state
        body = {"status": status, "models": versions, "refused": service.repository.refused}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @app.get("/metrics", **schema.METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/problems/{slug}", **schema.PROBLEM)
    async def problem(slug: str) -> PlainTextResponse:
        if slug not in PROBLEMS:
            raise UnknownPath(f"no problem type {slug!r}; there are: {', '.join(PROBLEMS)}")
        return PlainTextResponse(f"{PROBLEMS[slug].status} {slug}\n\n{PROBLEMS[slug].meaning}\n")

    return app


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
        "noise_version": contract.noise_version,
        "parameters": contract.traits.parameters,
        "outputs": model.outputs,
        "trained_on": contract.trained_on,
        "evaluation": contract.evaluation,
        "provider": model.artifact.provider,
        "bytes": model.artifact.size,
    }
