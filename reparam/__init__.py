"""Reparam: samples of trained VAEs, from a service to NumPy arrays.

    >>> import reparam
    >>> with reparam.Client("http://127.0.0.1:8000") as client:
    ...     samples = client.sample(n=16, seed=7)
    >>> samples.images.shape
    (16, 1, 28, 28)

All public names of the client are here. Modules with an underscore are private and may change.
"""

from typing import TYPE_CHECKING

from reparam._version import __version__

if TYPE_CHECKING:
    from reparam._client import AsyncClient, Client
    from reparam._errors import (
        BadRequest,
        ConnectionFailed,
        DeadlineExceeded,
        Invalid,
        MethodNotAllowed,
        NotAcceptable,
        NotFound,
        Overloaded,
        ReparamError,
        ServerError,
        StatusError,
        TimedOut,
        TooLarge,
        Unauthorized,
        Unavailable,
        UnsupportedMediaType,
    )
    from reparam._model import Model
    from reparam._options import SampleOptions
    from reparam._samples import Samples
else:
    # Names load when first used, because the service and the export also import this package but need no HTTP client.
    _MODULES = {
        "AsyncClient": "reparam._client",
        "Client": "reparam._client",
        "Model": "reparam._model",
        "SampleOptions": "reparam._options",
        "Samples": "reparam._samples",
    }

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES.get(name, "reparam._errors")), name)
        return value

    def __dir__() -> list[str]:
        return __all__


__all__ = [
    "AsyncClient",
    "BadRequest",
    "Client",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Invalid",
    "MethodNotAllowed",
    "Model",
    "NotAcceptable",
    "NotFound",
    "Overloaded",
    "ReparamError",
    "SampleOptions",
    "Samples",
    "ServerError",
    "StatusError",
    "TimedOut",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMediaType",
    "__version__",
]
