"""Training, evaluation, and publication of a trained network.

    >>> from reparam.export import Network, publish

Importing the package imports no torch: the commands `reparam inspect` and `reparam verify` run without it.
"""

from typing import TYPE_CHECKING, Any

import reparam.service.artifact  # noqa: F401  # before onnxruntime, whose reports to its makers it turns off

if TYPE_CHECKING:
    from reparam.export.network import Network
    from reparam.export.publication import publish

__all__ = ["Network", "publish"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562). Raises: AttributeError for another name."""
    if name == "Network":
        from reparam.export.network import Network

        return Network
    if name == "publish":
        from reparam.export.publication import publish

        return publish
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
