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

from reparam.export.compute import parallel_map, use_device
from reparam.export.config import Device
from reparam.export.draws import EVALUATION, as_images, generator, is_binary
from reparam.export.errors import RunError
from reparam.export.files import READ_ERRORS, read_tensors, write_atomically, write_tensors
from reparam.export.objectives import Count, elbo_terms, importance_weighted_bound
from reparam.export.run import Run
from reparam.models import VAE, Mixture

BATCH_IMAGES = 100  # images per batch; each batch has its own generator and is saved, so evaluations can resume
MAX_DECODED = 1000  # latents per call of the decoder
PARTIAL = ".evaluation.safetensors"


def evaluate(
    folder: Path, *, samples: int, rows: int | None, seed: int, device: Device | None = None
) -> dict[str, Any]:
    """Estimate bounds on log p(x) of the held-out images, with Gumbel codes one-hot.

    The result is written to evaluation.json in the run's folder. An evaluation of the same weights with more latents
    in all is not replaced. The same arguments give the same numbers on the same device, also after an interruption. An
    interrupted evaluation resumes. On a CPU each core evaluates other images.

    samples: m, latents of each image in the importance-weighted bound.
    rows: number of held-out images; None: all.
    seed: seed of the draws.
    device: "cpu" or "cuda"; None: a GPU if torch finds one.

    Returns: means over images in nats: `elbo` (from a single latent), `kl`, and `bound`, all under the prior of the
        training. `elbo_standard_error` and `bound_standard_error` are there from 2 images on. `m`, `images` and `seed`
        are the arguments; `binarization` says in words how images become binary. With a fitted mixture also
        `mixture_components`, and `mixture_bound` with its standard error: the bound with the mixture as the prior.
        With a learned mixture `kl` is an upper bound of the KL term, so `elbo` is slightly lower than the ELBO.

    Raises: RunError if the training has not finished, `rows` exceeds the held-out images, another process works in the
        folder, or a bound is not finite; DataError.
    """
    run = Run(folder)
    config, where = run.config(), use_device(device)
    model = run.trained()
    fitted = run.mixture()
    model.to(where)
    priors = [model.prior(), *([] if fitted is None else [fitted.to(where)])]
    data = run.data()
    if rows is not None and rows > len(data.test):
        raise RunError(f"there are {len(data.test)} held-out images, not {rows}: evaluate at most {len(data.test)}")
    pixels = torch.from_numpy(data.test[:rows].copy()).to(where)
    stamp = {"fingerprint": run.fingerprint(), "m": samples, "images": len(pixels), "seed": seed, "device": where.type}
    with run.locked():
        found = _all_bounds(folder / PARTIAL, stamp, model, priors, pixels, config.train.binarize)
    if wrong := int((~found.isfinite()).any(0).sum()):
        (folder / PARTIAL).unlink()
        raise RunError(
            f"the bound of {wrong} of {len(pixels)} images is NaN or infinite, for example because the encoder's "
            "variance is 0: train again with a lower --learning-rate"
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
    if not _has_longer_evaluation(run, result):
        write_atomically(folder / "evaluation.json", json.dumps(stamped, indent=2).encode())
    (folder / PARTIAL).unlink()
    return result


def _all_bounds(
    partial_file: Path, stamp: dict[str, Any], model: VAE, priors: list[Mixture], pixels: torch.Tensor, binarize: bool
) -> torch.Tensor:
    """Compute `_bounds` of all images; finished batches are read from and saved to `partial_file`.

    stamp: facts that decide the numbers, with `m` and `seed`. A partial file with another stamp is not used.
    priors: the model's prior, and the fitted mixture if there is a fitted mixture.
    pixels: uint8 (n, C, H, W).

    Returns: (2 + priors, n) float64.
    """
    samples, where = stamp["m"], pixels.device
    batches, done = pixels.split(BATCH_IMAGES), _load_partial(partial_file, stamp)
    draws = [generator(stamp["seed"], EVALUATION, number, device=where) for number in range(len(batches))]
    with (
        parallel_map(torch.get_num_threads() if where.type == "cpu" else 1) as map_batches,
        _progress(samples, len(pixels), sum(map(len, batches[: len(done)]))) as count,
    ):
        bounds = partial(_bounds, model, priors, samples, binarize, count)
        for found in map_batches(bounds, batches[len(done) :], draws[len(done) :]):
            done.append(found)
            _save_partial(partial_file, stamp, done)
    return torch.cat(done, 1)


@contextmanager
def _progress(samples: int, images: int, done: int) -> Iterator[Count]:
    """Show a progress bar.

    samples: latents per image.
    images: number of all images.
    done: number of images finished by an earlier evaluation.

    Yields: a function that advances the bar by a number of latents. Threads may outlive an interrupted evaluation, so
        after the end the function raises CancelledError.
    """
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
    """Evaluate one batch of images.

    samples: latents of each image in the importance-weighted bound.
    binarize: draw each pixel as 0 or 1.
    count: called with the number of latents after each call of the decoder.
    pixels: uint8 (n, C, H, W).

    Returns: one-sample ELBO, KL term, and the bound with each prior, (2 + priors, n) float64, in nats.
    """
    images = as_images(pixels, binarize, draws)
    likelihood, kl = elbo_terms(model, images, model.default_temperature, draws)
    at_a_time = max(1, MAX_DECODED // len(images))
    bounds = importance_weighted_bound(model, images, samples, draws, at_a_time, priors, count)
    return torch.stack([(likelihood - kl).double(), kl.double(), *bounds]).cpu()


def _means(found: torch.Tensor, mixture: Mixture | None) -> dict[str, Any]:
    """Compute the means of `evaluate` from the rows of `_bounds`.

    found: (2 + priors, n) float64.
    mixture: the fitted mixture; None without a fitted mixture.

    Returns: `elbo`, `kl` and `bound`; with a mixture also `mixture_components` and `mixture_bound`. From 2 images on
        each mean has a member `<name>_standard_error`, except `kl`.
    """
    elbo, kl, bound, *with_mixture = found
    means = _mean("elbo", elbo) | {"kl": kl.mean().item()} | _mean("bound", bound)
    if mixture is None:
        return means
    return means | {"mixture_components": len(mixture.log_weights)} | _mean("mixture_bound", *with_mixture)


def _save_partial(path: Path, stamp: dict[str, Any], done: list[torch.Tensor]) -> None:
    write_tensors(path, {str(number): tensor for number, tensor in enumerate(done)}, stamp=json.dumps(stamp))


def _load_partial(path: Path, stamp: dict[str, Any]) -> list[torch.Tensor]:
    """Finished batches of an interrupted evaluation; an empty list if the stamp differs or the file is damaged."""
    try:
        done, about = read_tensors(path)
        return [done[str(number)] for number in range(len(done))] if json.loads(about["stamp"]) == stamp else []
    except READ_ERRORS:
        return []


def read_evaluation(run: Run) -> dict[str, str | int | float]:
    """Read the evaluation of the current weights and prior.

    Returns: the members of `evaluate`'s result.

    Raises: RunError without such an evaluation.
    """
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


def _has_longer_evaluation(run: Run, result: dict[str, Any]) -> bool:
    """Return True if the run already has an evaluation with more latents."""
    try:
        kept = read_evaluation(run)
        latents = int(kept["images"]) * int(kept["m"])
    except (RunError, KeyError, ValueError):
        return False
    return latents > int(result["images"]) * int(result["m"])


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    """Compute a mean.

    name: name of the mean in the result.
    values: (n,).

    Returns: `<name>`, and `<name>_standard_error` if n is at least 2.
    """
    error = {f"{name}_standard_error": (values.std() / len(values) ** 0.5).item()} if len(values) > 1 else {}
    return {name: values.mean().item(), **error}
