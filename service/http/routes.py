"""Routes besides the operations: models, probes, metrics, and the meaning of problems."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from reparam.service.artifact.file import VERSION
from reparam.service.errors import PROBLEMS, Unavailable, UnknownPath, clipped
from reparam.service.http import openapi
from reparam.service.lifespan import STATES, Lifespan
from reparam.service.runtime.repository import Model
from reparam.service.telemetry.metrics import text

Handler = Callable[..., Coroutine[Any, Any, Response]]


def add_models(app: FastAPI, lifespan: Lifespan) -> None:
    """Add the routes for descriptions of models."""
    repository = lifespan.repository

    @_get(app, "/models", **openapi.MODELS)
    async def models() -> JSONResponse:
        lifespan.check_ready()
        served = [_described(lifespan, model) for model in lifespan.served()]
        return JSONResponse({"default": repository.default_name(), "models": served})

    @_get(app, "/models/{name}", **openapi.MODEL)
    async def model(name: str) -> JSONResponse:
        lifespan.check_ready()
        return JSONResponse(_described(lifespan, repository.find(name, None)))

    @_get(app, "/models/{name}/versions/{version}", **openapi.MODEL_VERSION)
    async def model_version(name: str, version: str) -> JSONResponse:
        lifespan.check_ready()
        if not VERSION.fullmatch(version):
            raise UnknownPath(
                f"a version is a whole number of at least 1, not {clipped(version)!r}; see /models/{clipped(name)}"
            )
        return JSONResponse(_described(lifespan, repository.find(name, int(version))))


def add_probes(app: FastAPI, lifespan: Lifespan) -> None:
    """Add the routes for load balancers, supervisors and Prometheus. Each answers for all workers."""

    @_get(app, "/livez", **openapi.LIVEZ)
    async def livez() -> JSONResponse:
        for report in await lifespan.collect_reports():
            if report.failure is not None:
                return JSONResponse({"status": "failed", "failure": report.failure}, 503)
        return JSONResponse({"status": "alive"})

    @_get(app, "/readyz", **openapi.READYZ)
    async def readyz() -> JSONResponse:
        states = {report.state for report in await lifespan.collect_reports()}
        status = min(states, key=STATES.index)
        repository = lifespan.repository
        body = {"status": status, "models": repository.available(), "refused": repository.refused}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @_get(app, "/metrics", **openapi.METRICS)
    async def metrics() -> Response:
        reports = await lifespan.collect_reports()
        counted = [report.metrics for report in reports if report.metrics is not None]
        if len(counted) < len(reports):
            raise Unavailable(
                "a worker does not answer, and the sums would be wrong without it: see /livez", retry_after=1
            )
        return Response(text(counted), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_problems(app: FastAPI) -> None:
    """Add the route for the meaning of problem types."""

    @_get(app, "/problems/{slug}", **openapi.PROBLEM)
    async def problem(slug: str) -> PlainTextResponse:
        if slug not in PROBLEMS:
            raise UnknownPath(f"no problem type {clipped(slug)!r}; there are: {', '.join(PROBLEMS)}")
        return PlainTextResponse(f"{PROBLEMS[slug].status} {slug}\n\n{PROBLEMS[slug].meaning}\n")


def _get(app: FastAPI, path: str, **described: Any) -> Callable[[Handler], Handler]:
    """Make a decorator for a route of GET and HEAD. A server must support both methods (RFC 9110, section 9.1).

    path: path of the route.
    described: the description for OpenAPI, as arguments of `app.get`.
    """

    def add(handler: Handler) -> Handler:
        app.head(path, include_in_schema=False)(handler)
        return app.get(path, **described)(handler)

    return add


def _described(lifespan: Lifespan, model: Model) -> dict[str, Any]:
    contract = model.contract
    return {
        "name": model.name,
        "version": model.version,
        "versions": sorted(lifespan.repository.models[model.name]),
        "kind": contract.kind,
        "latent_shape": contract.latent_shape,
        "image_shape": contract.image_shape,
        "default_temperature": contract.default_temperature,
        "precision": contract.precision,
        "noise_version": contract.noise_version,
        "parameters": list(contract.family.parameters),
        "priors": contract.priors,
        "outputs": contract.family.outputs,
        "trained_on": contract.trained_on,
        "evaluation": contract.evaluation,
        "provider": model.artifact.provider,
        "bytes": model.artifact.size,
    }
