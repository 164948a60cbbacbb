"""A prior fitted after training: the mixture that the encoder's latents of all training images most likely come from.

The best prior of a trained VAE is its aggregate posterior, the mean of q(z | x) over x (Tomczak and Welling, 2018,
https://arxiv.org/abs/1705.07120, section 2); a mixture of few components comes near it, at no cost in training
(Ghosh et al., 2020, https://arxiv.org/abs/1903.12436, section 4).
"""

from pathlib import Path

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from reparam.export.draws import PRIOR, as_images, generator
from reparam.export.errors import RunError
from reparam.export.run import Run
from reparam.models import VAE, Mixture

CONVERGED = 1e-4  # nats a latent, that the likelihood rises by in one round
MOST_ROUNDS = 300
ENCODED = 1000  # images at a time
IMAGES_EACH, MOST_COMPONENTS = 200, 50  # by default


@torch.inference_mode()
def fit_prior(folder: Path, *, components: int | None, seed: int) -> dict[str, float]:
    """Fit a mixture to one latent of each training image; `evaluate` and `publish` find it in the run's folder.

    components: None for `default_components`.

    Returns the mean of log p(z) over latents of the held-out images in nats, under the prior that the model was trained
    with and under the mixture: the difference is what the ELBO gains. If that is nothing the mixture is not kept, but
    one that was fitted to these weights before. Raises RunError, DataError.
    """
    run = Run(folder)
    model, data = run.trained(), run.data()
    if (learned := len(model.prior().log_weights)) > 1:
        raise RunError(f"{folder} learned a mixture of {learned} components with its weights: there is nothing to fit")
    draws = generator(seed, PRIOR)
    binarize = run.config().train.binarize
    seen, unseen = (
        encoded(model, torch.from_numpy(pixels.copy()), binarize, draws) for pixels in (data.train, data.test)
    )
    with run.alone():
        mixture = fit_mixture(model, seen, components or default_components(len(data.train)), seed)
        densities = {
            name: torch.cat([prior.log_prob(model, part) for part in unseen.split(ENCODED)]).mean().item()
            for name, prior in (("standard", model.prior()), ("mixture", mixture))
        }
        if densities["mixture"] > densities["standard"]:
            run.keep_prior(mixture)
        else:
            run.drop_stale_prior()
    return densities


def default_components(images: int) -> int:
    """One of every IMAGES_EACH training images, at most MOST_COMPONENTS."""
    return min(MOST_COMPONENTS, max(1, images // IMAGES_EACH))


def fit_mixture(family: VAE | type[VAE], latents: Tensor, components: int, seed: int) -> Mixture:
    """The mixture with the largest likelihood near where k-means begins, by expectation maximization (Dempster, Laird
    and Rubin, 1977).

    family: of the components, a model or its class. latents: (n, *latent_shape), one-hot codes for a categorical model.

    Raises RunError if too few of them differ.
    """
    latents = latents.detach()
    distinct = len(latents.flatten(1).unique(dim=0))
    if distinct < components:
        raise RunError(f"{components} components need as many different latents, there are {distinct}: fit fewer")
    with threadpool_limits(1, "openmp"):  # three threads or more add up in whatever order they come
        clusters = KMeans(components, n_init=1, random_state=seed).fit_predict(latents.flatten(1).numpy())
    responsibilities = torch.nn.functional.one_hot(torch.from_numpy(clusters).long(), components).to(latents.dtype)
    before = -torch.inf
    for _ in tqdm(range(MOST_ROUNDS), desc=f"mixture of {components}", leave=False, disable=None):
        # A component that no latent is near keeps a trace of all of them.
        responsibilities = responsibilities + 1e-10
        mixture = Mixture(responsibilities.mean(0).log(), family.most_likely(latents, responsibilities))
        log_joint = torch.cat([mixture.log_joint(family, part) for part in latents.split(ENCODED)])
        likelihood = log_joint.logsumexp(1).mean().item()
        if likelihood - before < CONVERGED:
            break
        before, responsibilities = likelihood, log_joint.softmax(1)
    return mixture


@torch.inference_mode()
def encoded(model: VAE, pixels: Tensor, binarize: bool, draws: torch.Generator) -> Tensor:
    """One latent of each image from q(z | x), (n, *latent_shape), on the CPU. pixels: uint8 (n, C, H, W)."""
    model.eval()
    latents = []
    for batch in pixels.split(ENCODED):
        posterior = model.encode(as_images(batch, binarize, draws))
        noise = model.noise(tuple(posterior[0].shape), draws)
        latents.append(model.sample(posterior, noise, model.default_temperature).cpu())
    return torch.cat(latents)
