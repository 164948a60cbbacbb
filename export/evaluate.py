"""Evaluation: bounds on log p(x) of the held-out images, in nats."""

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from export.data import load
from export.errors import RunError
from export.objectives import elbo_terms, importance_weighted_bound
from export.run import Run, write_atomically
from export.train import EVALUATION_BATCH, as_images, describe, generator


@torch.inference_mode()
def evaluate(folder: Path, *, samples: int, rows: int | None, seed: int) -> dict[str, Any]:
    """The one-sample ELBO and the importance-weighted bound with m = `samples`, means over held-out images with their
    standard errors. Gumbel codes are one-hot. The same arguments give the same numbers.

    rows: how many of the held-out images; None for all. Written to evaluation.json in the run's folder.
    """
    run = Run(folder)
    config, model = run.config(), run.trained()
    data = load(config.train.data)
    if describe(config.train, data) != config:
        raise RunError(f"{config.train.data} has changed since {folder} was trained on it")
    pixels = torch.from_numpy(data.test[:rows].copy())
    draws = generator(seed, purpose=0)
    elbos, kls, bounds = [], [], []
    for batch in tqdm(pixels.split(EVALUATION_BATCH), desc=f"bound with m={samples}", disable=None):
        images = as_images(batch, config.train.binarize, draws)
        likelihood, kl = elbo_terms(model, images, model.default_temperature, draws)
        elbos.append((likelihood - kl).double())
        kls.append(kl.double())
        bounds.append(importance_weighted_bound(model, images, samples, draws))
    elbo, kl, bound = torch.cat(elbos), torch.cat(kls), torch.cat(bounds)
    result = {
        "elbo": elbo.mean().item(),
        "elbo_standard_error": _standard_error(elbo),
        "kl": kl.mean().item(),
        "bound": bound.mean().item(),
        "bound_standard_error": _standard_error(bound),
        "m": samples,
        "images": len(pixels),
        "binarization": "dynamic" if config.train.binarize else "none: grey values, no bound on log p(x)",
        "seed": seed,
    }
    stamped = {"checkpoint_sha256": run.fingerprint(), **result}
    write_atomically(folder / "evaluation.json", json.dumps(stamped, indent=2).encode())
    return result


def read_evaluation(run: Run) -> dict[str, str | int | float]:
    """What `evaluate` found for the weights as they are now. Raises RunError."""
    path = run.folder / "evaluation.json"
    try:
        stamped: dict[str, str | int | float] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        stamped = {}
    if stamped.pop("checkpoint_sha256", None) != run.fingerprint():
        raise RunError(
            f"{run.folder} has no evaluation of its last checkpoint: `python -m export evaluate {run.folder}`"
        )
    return stamped


def _standard_error(values: torch.Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0
