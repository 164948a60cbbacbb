"""Description of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """The service's description of one model version.

    name, version: the model and the version described.
    versions: all versions of the model on the service.
    kind: "gaussian" or "gumbel".
    latent_shape: shape of the latent of one row; (variables, categories) for Gumbel.
    image_shape: (channels, height, width).
    default_temperature: temperature of a request without `temperature`.
    noise_version: version of the function from seed and row to noise.
    parameters: names of the parameters allowed in a request, ("mu", "log_var") or ("logits",).
    priors: distributions of rows without parameters; the first is the default.
    outputs: names of the outputs available to requests.
    trained_on: facts about the training data, by name.
    evaluation: measurements on held-out images, by name.
    provider: execution provider of onnxruntime on the service, such as "CPUExecutionProvider".
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
        """Read a description from JSON. Unknown fields are ignored.

        Raises: KeyError for a missing field.
        """
        described = {"priors": ("standard",), **described}  # older services have no such field
        fields = {name: described[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {name: tuple(fields[name]) for name in _TUPLES})


_TUPLES = ("versions", "latent_shape", "image_shape", "parameters", "priors", "outputs")
