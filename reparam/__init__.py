"""Reparam: samples of trained VAEs, from a service to NumPy arrays.

    >>> import reparam
    >>> with reparam.Client("http://127.0.0.1:8000") as client:
    ...     samples = client.sample(n=16, seed=7)
    >>> samples.images.shape
    (16, 1, 28, 28)

Everything public is named here; the modules below this one may change.
"""

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
from reparam._samples import Samples
from reparam._version import __version__

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
