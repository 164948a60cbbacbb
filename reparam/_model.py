"""A model, as the service describes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A model that the service has.

    name, version: of this description. versions: all that can be asked for.
    kind: "gaussian" or "gumbel". latent_shape: of one row; for Gumbel (variables, categories).
    image_shape: (channels, height, width). default_temperature: of a request that gives none.
    parameters: what a request may give, ("mu", "log_var") or ("logits",). outputs: what it may ask for.
    priors: what rows without parameters can be drawn from; the first is the default.
    trained_on: the data. evaluation: what was measured on held-out images. noise_version: of the contract that makes a
    row's noise. provider: what runs the model in onnxruntime.
    """

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
        """Raises KeyError where a field is missing. Fields that this version of the SDK does not know are left out."""
        described = {"priors": ("standard",), **described}  # services older than the field
        fields = {name: described[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {name: tuple(fields[name]) for name in _TUPLES})


_TUPLES = ("versions", "latent_shape", "image_shape", "parameters", "priors", "outputs")
