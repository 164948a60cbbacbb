"""Evaluation: bounds on log p(x) of the held-out images, in nats."""

import json
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from tqdm import tqdm

from reparam.export.compute import one_core_each, use_device
from reparam.export.config import Device
from reparam.export.draws import EVALUATION, as_images, generator, is_binary
from reparam.export.errors import RunError
from reparam.export.files import DAMAGED, read_tensors, write_atomically, write_tensors
from reparam.export.objectives import Count, elbo_terms, importance_weighted_bound
from reparam.export.run import Run
from reparam.models import VAE, Mixture

IMAGES = 100  # that are evaluated together, each with draws of its own: where an evaluation can go on
DECODED = 1000  # rows of a run of the decoder
PARTIAL = ".evaluation.safetensors"


def evaluate(
    folder: Path, *, samples: int, rows: int | None, seed: int, device: Device | None = None
) -> dict[str, Any]:
    """The one-sample ELBO and the importance-weighted bound with m = `samples`, means over held-out images with their
    standard errors, under the prior that the model was trained with; if a mixture was fitted afterwards, the bound with
    that as the prior too. Under a mixture that was learned with the weights kl is an upper bound of the KL term, and
    elbo a little lower than the ELBO. Gumbel codes are one-hot. The same arguments give the same numbers on the same
    device, also after an interruption, from which it goes on. Each core (of a CPU) takes images of its own.

    rows: how many of the held-out images; None for all. Written to evaluation.json in the run's folder, unless that has
    one of more latents, of the same weights.

    Returns elbo, kl and bound, with the _standard_error of the first and last, m, images, binarization and seed; of a
    mixture that was fitted also mixture_components and mixture_bound. Raises RunError, DataError.
    """
    run = Run(folder)
    config, where = run.config(), use_device(device)
    model = run.trained()
    fitted = run.mixture()
    model.to(where)
    priors = [model.prior(), *([] if fitted is None else [fitted.to(where)])]
    data = run.data()
    if rows is not None and rows > len(data.test):
        raise RunError(f"there are {len(data.test)} held-out images, not {rows}: ask for no more")
    pixels = torch.from_numpy(data.test[:rows].copy()).to(where)
    stamp = {"fingerprint": run.fingerprint(), "m": samples, "images": len(pixels), "seed": seed, "device": where.type}
    with run.alone():
        found = _all_bounds(folder / PARTIAL, stamp, model, priors, pixels, config.train.binarize)
    if wrong := int((~found.isfinite()).any(0).sum()):
        (folder / PARTIAL).unlink()
        raise RunError(
            f"the bound of {wrong} of {len(pixels)} images is no number, as where the encoder leaves no variance: "
            "train anew with a lower --learning-rate"
        )
    binarization = "dynamic" if config.train.binarize else "none: grey values, no bound on log p(x)"
    result = {
        **_means(found, fitted),
        "m": samples,
        "images": len(pixels),
        "binarization": "static" if is_binary(pixels) else binarization,
        "seed": seed,
    }
    stamped = {"fingerprint": stamp["fingerprint"], **result}
    if not _has_more(run, result):
        write_atomically(folder / "evaluation.json", json.dumps(stamped, indent=2).encode())
    (folder / PARTIAL).unlink()
    return result


def _all_bounds(
    partly: Path, stamp: dict[str, Any], model: VAE, priors: list[Mixture], pixels: torch.Tensor, binarize: bool
) -> torch.Tensor:
    """`_bounds` of all images, (2 + priors, n). The file `partly` holds those that are done."""
    samples, where = stamp["m"], pixels.device
    batches, done = pixels.split(IMAGES), _resume(partly, stamp)
    draws = [generator(stamp["seed"], EVALUATION, number, device=where) for number in range(len(batches))]
    with (
        one_core_each(torch.get_num_threads() if where.type == "cpu" else 1) as in_parallel,
        _progress(samples, len(pixels), sum(map(len, batches[: len(done)]))) as count,
    ):
        bounds = partial(_bounds, model, priors, samples, binarize, count)
        for found in in_parallel(bounds, batches[len(done) :], draws[len(done) :]):
            done.append(found)
            _keep(partly, stamp, done)
    return torch.cat(done, 1)


@contextmanager
def _progress(samples: int, images: int, done: int) -> Iterator[Count]:
    """Shows what is counted. Whoever counts after the end, because the evaluation was interrupted, is cancelled."""
    over = Event()
    with tqdm(
        desc=f"bound with m={samples}",
        total=images * samples,
        initial=done * samples,
        unit=" latents",
        unit_scale=True,
        disable=None,
    ) as progress:

        def count(latents: int) -> None:
            if over.is_set():
                raise CancelledError
            progress.update(latents)

        try:
            yield count
        finally:
            over.set()


@torch.inference_mode()
def _bounds(
    model: VAE,
    priors: list[Mixture],
    samples: int,
    binarize: bool,
    count: Count,
    pixels: torch.Tensor,
    draws: torch.Generator,
) -> torch.Tensor:
    """The one-sample ELBO of each image, its KL term, and the bound with each prior, (2 + priors, n) float64."""
    images = as_images(pixels, binarize, draws)
    likelihood, kl = elbo_terms(model, images, model.default_temperature, draws)
    at_a_time = max(1, DECODED // len(images))
    bounds = importance_weighted_bound(model, images, samples, draws, at_a_time, priors, count)
    return torch.stack([(likelihood - kl).double(), kl.double(), *bounds]).cpu()


def _means(found: torch.Tensor, mixture: Mixture | None) -> dict[str, Any]:
    """Of what `_bounds` found of all images, with standard errors."""
    elbo, kl, bound, *with_mixture = found
    means = _mean("elbo", elbo) | {"kl": kl.mean().item()} | _mean("bound", bound)
    if mixture is None:
        return means
    return means | {"mixture_components": len(mixture.log_weights)} | _mean("mixture_bound", *with_mixture)


def _keep(path: Path, stamp: dict[str, Any], done: list[torch.Tensor]) -> None:
    write_tensors(path, {str(number): tensor for number, tensor in enumerate(done)}, stamp=json.dumps(stamp))


def _resume(path: Path, stamp: dict[str, Any]) -> list[torch.Tensor]:
    """What an interrupted evaluation of the same has found; nothing if it was of something else."""
    try:
        done, about = read_tensors(path)
        return [done[str(number)] for number in range(len(done))] if json.loads(about["stamp"]) == stamp else []
    except DAMAGED:
        return []


def read_evaluation(run: Run) -> dict[str, str | int | float]:
    """What `evaluate` found for the weights as they are now. Raises RunError."""
    path = run.folder / "evaluation.json"
    try:
        stamped: dict[str, str | int | float] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        stamped = {}
    if stamped.pop("fingerprint", None) != run.fingerprint():
        raise RunError(
            f"{run.folder} has no evaluation of its last checkpoint and prior: `reparam evaluate {run.folder}`"
        )
    return stamped


def _has_more(run: Run, result: dict[str, Any]) -> bool:
    """Whether the run has an evaluation by more latents than this."""
    try:
        kept = read_evaluation(run)
        latents = int(kept["images"]) * int(kept["m"])
    except (RunError, KeyError, ValueError):
        return False
    return latents > int(result["images"]) * int(result["m"])


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    """With its standard error, which a single value has none of."""
    error = {f"{name}_standard_error": (values.std() / len(values) ** 0.5).item()} if len(values) > 1 else {}
    return {name: values.mean().item(), **error}
