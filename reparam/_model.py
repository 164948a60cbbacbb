"""Description of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A version of a model, as the service describes it.

    name, version: the model and the version described.
    versions: all versions that the service has.
    kind: "gaussian" or "gumbel".
    latent_shape: shape of the latent of one row; (variables, categories) for Gumbel.
    image_shape: (channels, height, width).
    default_temperature: temperature of a request without a temperature.
    noise_version: version of the function from seed and row to noise.
    parameters: parameters that a request may give, ("mu", "log_var") or ("logits",).
    priors: distributions of rows without parameters; the first is the default.
    outputs: outputs that a request may ask for.
    trained_on: the training data.
    evaluation: measurements on held-out images.
    provider: execution provider of onnxruntime that runs the model.
    """

    __module__ = "reparam"  # pickles name the public class, not this module

    name: str
    version: int
    versions: tuple[int, ...]
    kind: str
    latent_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    default_temperature: float
    noise_version: int
    parameters: tuple[str, ...]
    priors: tuple[str, ...]
    outputs: tuple[str, ...]
    trained_on: Mapping[str, str | int | float]
    evaluation: Mapping[str, str | int | float]
    provider: str

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> "Model":
        """Read a description. Unknown fields are left out. Raises: KeyError for a missing field."""
        described = {"priors": ("standard",), **described}  # older services have no such field
        fields = {name: described[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {name: tuple(fields[name]) for name in _TUPLES})


_TUPLES = ("versions", "latent_shape", "image_shape", "parameters", "priors", "outputs")
