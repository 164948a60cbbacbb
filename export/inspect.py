"""A summary of an artifact for people."""

from pathlib import Path
from typing import Any

import numpy as np

from reparam.service.artifact.file import ENCODER_FILE, MODEL_FILE, load


def inspect(folder: Path) -> str:
    """Summarize an artifact: contract, prior, sizes, evaluation.

    folder: one version, as artifacts/NAME/1.

    Returns: lines of a name and a value.

    Raises: ArtifactError if model.onnx breaks the contract.
    """
    artifact = load(folder / MODEL_FILE)
    contract, encoder = artifact.contract, folder / ENCODER_FILE
    lines: dict[str, Any] = {
        "artifact": folder,
        "kind": contract.kind,
        "latent shape": _shape(contract.latent_shape),
        "image shape": f"{_shape(contract.image_shape)} (C x H x W)",
        "default temperature": f"{contract.default_temperature:g}",
        "decoder precision": contract.precision,
        "noise version": contract.noise_version,
        **{f"prior {name}": _summary(values) for name, values in contract.prior.items()},
        **{f"mixture {name}": _summary(values) for name, values in (contract.mixture or {}).items()},
        "inputs": _signature({name: ("tensor(float)", shape) for name, shape in contract.inputs().items()}),
        "outputs": _signature(contract.outputs()),
        MODEL_FILE: f"{artifact.size / 1e6:.2f} MB",
        ENCODER_FILE: f"{encoder.stat().st_size / 1e6:.2f} MB" if encoder.exists() else "missing",
        **{f"trained on {key}": value for key, value in contract.trained_on.items()},
        **{f"evaluation {key}": value for key, value in contract.evaluation.items()},
        **{f"made with {tool}": version for tool, version in contract.tools.items()},
    }
    width = max(map(len, lines))
    return "\n".join(f"{key:{width}}  {_text(value)}" for key, value in lines.items())


def _summary(values: float | list[Any]) -> str:
    if not isinstance(values, list):
        return f"{values:g} for every element"
    array = np.array(values)
    return f"{array.size} values from {array.min():.3f} to {array.max():.3f}"


def _signature(nodes: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(
        f"{name} {type_[7:-1]} ({', '.join(['n', *map(str, shape)])})" for name, (type_, shape) in nodes.items()
    )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
