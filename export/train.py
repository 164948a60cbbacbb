"""Training by Adam. The same configuration gives the same weights, also after an interruption."""

import math
import time
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reparam.export.compute import parallel_map, use_device
from reparam.export.config import TrainConfig
from reparam.export.data import Dataset, anywhere, load
from reparam.export.draws import HELD_OUT, ORDER, PRIOR, SHEET, TRAINING, as_images, generator, is_binary
from reparam.export.errors import RunError
from reparam.export.files import all_finite, write_atomically
from reparam.export.learner import Learner, flat_gradient
from reparam.export.objectives import (
    Terms,
    cosine_decay,
    elbo_terms,
    gumbel_temperature,
    negative_elbo,
    negative_iwae,
    negative_vimco,
    warm_up,
)
from reparam.export.prior import fit_mixture, sample_latents
from reparam.export.run import Run, RunConfig
from reparam.models import VAE
from reparam.models.bodies import set_initial_bias
from reparam.service.pictures import png, sheet

SHEET_ROWS = 64
EVALUATION_BATCH = 500
MIN_SHARE = 64  # fewest latents in one share of a batch; a share is a part computed on its own CPU thread


def train(config: TrainConfig, out: Path, *, resume: bool, sheet_every: int) -> Run:
    """Train a network into the folder `out`, or with `resume` continue the run there.

    config: configuration; device and shares default to the run's own settings, or to settings for this machine.
    out: folder of the run.
    resume: continue the run in `out`; if the folder holds no run, start a new run.
    sheet_every: epochs between two contact sheets.

    Returns: the finished run.

    Raises: DataError; RunError if the run cannot be started or resumed, if another process works in the folder, or if
        bound or weights are not finite.
    """
    data, run = load(config.data), Run(out)
    resumes = resume and (out / "config.json").exists()
    config = _with_compute_settings(config, run.config().train if resumes else None)
    run_config = RunConfig.of(config.model_copy(update={"data": anywhere(config.data)}), data)
    if resumes:
        run.resume(run_config)
    model = run_config.build()
    if not resumes:
        run.start(run_config)
    with run.locked():
        _train(model, data, config, run, sheet_every)
    return run


def _train(model: VAE, data: Dataset, config: TrainConfig, run: Run, sheet_every: int) -> None:
    where = use_device(config.device)
    images, held_out = (torch.from_numpy(pixels.copy()).to(where) for pixels in (data.train, data.test))
    if is_binary(images) and is_binary(held_out):
        config = config.model_copy(update={"binarize": False})  # the images stay the same; saves the draws
    model.to(where)
    set_initial_bias(model.decoder, images.float().mean(0) / 255)
    learner = Learner(model, config.average)
    done = run.restore(learner.load)
    run.drop_metrics_after(done)
    for epoch in range(done, config.epochs):
        if config.prior_components > 1 and epoch == config.equal_prior_epochs:
            latents = sample_latents(model, images, config.binarize, generator(config.seed, PRIOR, device=where))
            mixture = fit_mixture(model, latents, config.prior_components, config.seed)
            for each in (model, learner.evaluated):
                each.set_prior(mixture)
        metrics = train_epoch(learner, images, config, epoch)
        metrics |= _held_out_metrics(learner.evaluated, held_out, config)
        state = learner.state()
        if not (math.isfinite(metrics["elbo"] + metrics["held_out_elbo"]) and all_finite(state.values())):
            raise RunError(f"the bound or the weights are NaN or infinite in epoch {epoch + 1}: lower --learning-rate")
        run.log({"epoch": epoch + 1, **metrics})
        if (epoch + 1) % sheet_every == 0 or epoch + 1 == config.epochs:
            path = run.folder / "sheets" / f"epoch-{epoch + 1:04d}.png"
            write_atomically(path, contact_sheet(learner.evaluated, held_out, config))
        run.save(epoch + 1, state)
        tqdm.write(f"epoch {epoch + 1}/{config.epochs}  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def _with_compute_settings(config: TrainConfig, before: TrainConfig | None) -> TrainConfig:
    """Fill in device and shares.

    In order of priority: the given values, the values of the resumed run, defaults for this machine.

    before: configuration of the resumed run; None for a new run.

    Raises: RunError for "cuda" without a GPU.
    """
    if before is None:
        device = use_device(config.device)
        return config.model_copy(
            update={"device": device.type, "shares": config.shares or _default_shares(config, device)}
        )
    return config.model_copy(
        update={name: getattr(config, name) or getattr(before, name) for name in ("device", "shares")}
    )


def _default_shares(config: TrainConfig, device: torch.device) -> int:
    """Choose the number of shares of a batch: at most as many as CPU threads, with at least MIN_SHARE latents each.

    The number is 1 on a GPU, and with free bits, because free bits use the mean over a whole batch.
    """
    worth = 1 if config.free_bits or device.type == "cuda" else config.batch_size * config.samples // MIN_SHARE
    return max(1, min(torch.get_num_threads(), worth))


def train_epoch(learner: Learner, pixels: Tensor, config: TrainConfig, epoch: int) -> dict[str, float]:
    """Train one epoch.

    learner: network in training; changed in place.
    pixels: uint8 (n, C, H, W).
    epoch: number of the epoch, from 0.

    Returns: metrics by name: `elbo` and `kl`, means over all images in nats; `temperature` of the last step;
        `images_per_second`. If the prior is a mixture also `components`, the number of components in use.
    """
    model = learner.model
    if epoch < config.elbo_epochs:
        config = config.model_copy(update={"objective": "elbo", "samples": 1, "straight_through": False})
    shares = config.shares or 1
    order = torch.randperm(len(pixels), generator=generator(config.seed, ORDER, epoch)).to(pixels.device)
    draws = [generator(config.seed, TRAINING, epoch, share, pixels.device) for share in range(shares)]
    batches = order.split(config.batch_size)
    first_step, last_step = epoch * len(batches), config.epochs * len(batches)
    started = time.perf_counter()
    seen: list[Tensor] = []
    model.train()
    with parallel_map(shares) as map_shares:
        for step, rows in enumerate(tqdm(batches, desc=f"epoch {epoch + 1}", leave=False, disable=None), first_step):
            settings = step_settings(config, step, len(batches))
            compute = partial(share_gradient, model, config, settings, 1 / len(rows))
            parts = map_shares(compute, pixels.index_select(0, rows).chunk(shares), draws)
            gradients, terms = zip(*parts, strict=True)
            seen += terms
            learner.step(
                reduce(Tensor.add_, gradients), config.learning_rate * cosine_decay(step, last_step), settings.kl_weight
            )
    likelihood_mean, kl_mean = torch.cat(seen, 1).double().mean(1).tolist()
    seconds = time.perf_counter() - started
    log_weights = model.prior().log_weights
    return {
        "elbo": likelihood_mean - kl_mean,
        "kl": kl_mean,
        **({"components": _perplexity(log_weights)} if len(log_weights) > 1 else {}),
        "temperature": settings.temperature,
        "images_per_second": len(pixels) / seconds,
    }


def _perplexity(log_weights: Tensor) -> float:
    """Perplexity of mixture weights, exp(entropy): the number of components in use."""
    return math.exp(-(log_weights.exp() * log_weights).sum().item())


class StepSettings(NamedTuple):
    """Settings of the objective for one step.

    temperature: temperature of relaxed codes; 1 for a Gaussian latent.
    kl_weight: weight of the KL term, 0 .. 1.
    """

    temperature: float
    kl_weight: float


def step_settings(config: TrainConfig, step: int, steps_per_epoch: int) -> StepSettings:
    """Compute the settings of a step.

    step: number of the step, 0 for the first step of the training.
    steps_per_epoch: number of steps in an epoch.
    """
    temperature = gumbel_temperature(step, config.tau_start, config.tau_min, config.tau_rate, config.tau_every)
    return StepSettings(
        temperature if config.kind == "gumbel" else 1.0,
        warm_up(step, config.kl_warm_up * steps_per_epoch),
    )


def share_gradient(
    model: VAE,
    config: TrainConfig,
    settings: StepSettings,
    image_weight: float,
    pixels: Tensor,
    draws: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of one share of a batch.

    settings: settings of the step.
    image_weight: weight of an image in the batch's mean, 1 / images in the batch.
    pixels: uint8 (n, C, H, W), the images of the share.
    draws: generator of the share.

    Returns: the share's part of the batch's gradient, (P,) as from `flat_gradient`; the sum over shares is the batch's
        gradient. Then likelihood and KL term of each image, (2, n) in nats.
    """
    terms = _objective(model, as_images(pixels, config.binarize, draws), draws, config, settings)
    loss = terms.loss * (len(pixels) * image_weight)
    return flat_gradient(loss, model), torch.stack([terms.likelihood, terms.kl])


def _objective(
    model: VAE, images: Tensor, draws: torch.Generator, config: TrainConfig, settings: StepSettings
) -> Terms:
    if config.objective == "vimco":
        return negative_vimco(model, images, draws, samples=config.samples, kl_weight=settings.kl_weight)
    if config.objective in ("iwae", "dreg"):
        doubly = config.objective == "dreg"
        return negative_iwae(
            model,
            images,
            draws,
            samples=config.samples,
            kl_weight=settings.kl_weight,
            doubly=doubly,
            resampled=config.resampled,
        )
    return negative_elbo(
        model,
        images,
        draws,
        temperature=settings.temperature,
        samples=config.samples,
        kl_weight=settings.kl_weight,
        free_bits=config.free_bits,
        straight_through=config.straight_through,
    )


@torch.inference_mode()
def _held_out_metrics(model: VAE, pixels: Tensor, config: TrainConfig) -> dict[str, float]:
    """Estimate the ELBO of the held-out images from one latent each, at the model's default temperature.

    pixels: uint8 (n, C, H, W).

    Returns: `held_out_elbo`, the mean in nats.
    """
    model.eval()
    draws = generator(config.seed, HELD_OUT, device=pixels.device)
    total = 0.0
    for batch in pixels.split(EVALUATION_BATCH):
        images = as_images(batch, config.binarize, draws)
        likelihood, kl = elbo_terms(model, images, model.default_temperature, draws)
        total += (likelihood - kl).double().sum().item()
    return {"held_out_elbo": total / len(pixels)}


@torch.inference_mode()
def contact_sheet(model: VAE, pixels: Tensor, config: TrainConfig) -> bytes:
    """Draw samples of the prior on the left, and held-out images above their reconstructions on the right.

    pixels: uint8 (n, C, H, W), the held-out images; the first SHEET_ROWS / 2 are shown.

    Returns: a PNG.
    """
    model.eval()
    draws = generator(config.seed, SHEET, device=pixels.device)
    images = as_images(pixels[: SHEET_ROWS // 2], config.binarize, draws)
    noise = model.noise((SHEET_ROWS, *model.config.latent_shape), draws)
    prior = model.prior().draw(SHEET_ROWS, draws)
    samples = _decode(model, model.sample(prior, noise, model.default_temperature))
    posterior = model.encode(images)
    noise = torch.zeros_like(posterior[0])  # zero noise at temperature 0: the most likely latents
    reconstructions = _decode(model, model.sample(posterior, noise, 0.0))
    pairs = torch.stack([(images * 255).byte().cpu(), reconstructions], 1).flatten(0, 1)
    # Order the pairs for eight columns: even rows show originals, odd rows show reconstructions.
    pairs = pairs.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2) if len(pairs) % 16 == 0 else pairs
    left, right = sheet(samples.numpy(), 8), sheet(pairs.numpy(), 8)
    right = np.pad(right, ((0, 0), (0, left.shape[1] - right.shape[1]), (0, 0)))
    return png(np.concatenate([left, right], axis=2))


def _decode(model: VAE, latents: Tensor) -> Tensor:
    return (torch.sigmoid(model.decode(latents)) * 255).round().byte().cpu()
