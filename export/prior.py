"""A prior fitted after the training: a mixture fitted to the encoder's latents of all training images.

The best prior of a trained VAE is the aggregate posterior, the mean of q(z | x) over x (Tomczak and Welling, 2018,
https://arxiv.org/abs/1705.07120, section 2). A mixture of a few components comes near the aggregate posterior without
further training (Ghosh et al., 2020, https://arxiv.org/abs/1903.12436, section 4).
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

CONVERGED = 1e-4  # nats; stop when the mean log-likelihood of a latent rises by less in one iteration
MAX_ITERATIONS = 300
BATCH = 1000  # images per call of the encoder
IMAGES_PER_COMPONENT, MAX_COMPONENTS = 200, 50  # defaults


@torch.inference_mode()
def fit_prior(folder: Path, *, components: int | None, seed: int) -> dict[str, float]:
    """Fit a mixture to one latent of each training image, and save the mixture in the run's folder.

    The mixture is saved only if the held-out density rises; otherwise an older mixture of the same weights stays.
    `evaluate` and `publish` use the saved mixture.

    components: number of components; None: `default_components`.
    seed: seed of the latents and of the initial clusters.

    Returns: mean log p(z) of latents of the held-out images, in nats. The key `standard` is for the prior of the
        training, `mixture` for the fitted mixture. The difference is the gain of the ELBO.

    Raises: RunError if the training has not finished or learned a mixture itself, if there are too few different
        latents, or if another process works in the folder; DataError.
    """
    run = Run(folder)
    model, data = run.trained(), run.data()
    if (learned := len(model.prior().log_weights)) > 1:
        raise RunError(f"{folder} learned a mixture of {learned} components with its weights: there is nothing to fit")
    draws = generator(seed, PRIOR)
    binarize = run.config().train.binarize
    seen, unseen = (
        sample_latents(model, torch.from_numpy(pixels.copy()), binarize, draws) for pixels in (data.train, data.test)
    )
    with run.locked():
        mixture = fit_mixture(model, seen, components or default_components(len(data.train)), seed)
        densities = {
            name: torch.cat([prior.log_prob(model, part) for part in unseen.split(BATCH)]).mean().item()
            for name, prior in (("standard", model.prior()), ("mixture", mixture))
        }
        if densities["mixture"] > densities["standard"]:
            run.save_prior(mixture)
        else:
            run.drop_stale_prior()
    return densities


def default_components(images: int) -> int:
    """Choose the number of components for a number of training images.

    Returns: one component per IMAGES_PER_COMPONENT images, at least 1, at most MAX_COMPONENTS.
    """
    return min(MAX_COMPONENTS, max(1, images // IMAGES_PER_COMPONENT))


def fit_mixture(family: VAE | type[VAE], latents: Tensor, components: int, seed: int) -> Mixture:
    """Fit a mixture by expectation maximization (Dempster, Laird and Rubin, 1977), starting from k-means clusters.

    family: distribution of the components: a model, or the class GaussianVAE or GumbelVAE.
    latents: float32 (n, *latent_shape) on the CPU; one-hot codes for a Gumbel model.
    components: number of components.
    seed: seed of k-means.

    Returns: a mixture of `components` components, float32 on the CPU.

    Raises: RunError if there are fewer different latents than components.
    """
    latents = latents.detach()
    distinct = len(latents.flatten(1).unique(dim=0))
    if distinct < components:
        raise RunError(
            f"{components} components need as many different latents, there are {distinct}: fit fewer components"
        )
    with threadpool_limits(1, "openmp"):  # with three or more threads the order of sums, and so the result, varies
        clusters = KMeans(components, n_init=1, random_state=seed).fit_predict(latents.flatten(1).numpy())
    responsibilities = torch.nn.functional.one_hot(torch.from_numpy(clusters).long(), components).to(latents.dtype)
    before = -torch.inf
    for _ in tqdm(range(MAX_ITERATIONS), desc=f"mixture of {components}", leave=False, disable=None):
        # A component far from every latent keeps a tiny responsibility for all latents, so its moments stay finite.
        responsibilities = responsibilities + 1e-10
        mixture = Mixture(responsibilities.mean(0).log(), family.most_likely(latents, responsibilities))
        log_joint = torch.cat([mixture.log_joint(family, part) for part in latents.split(BATCH)])
        likelihood = log_joint.logsumexp(1).mean().item()
        if likelihood - before < CONVERGED:
            break
        before, responsibilities = likelihood, log_joint.softmax(1)
    return mixture


@torch.inference_mode()
def sample_latents(model: VAE, pixels: Tensor, binarize: bool, draws: torch.Generator) -> Tensor:
    """Draw one latent of q(z | x) for each image, at the model's default temperature.

    model: put into evaluation mode.
    pixels: uint8 (n, C, H, W), on the model's device.
    binarize: draw each pixel as 0 or 1 before encoding.
    draws: generator of pixels and noise, on the model's device.

    Returns: float32 (n, *latent_shape), on the CPU; one-hot codes for a Gumbel model.
    """
    model.eval()
    latents = []
    for batch in pixels.split(BATCH):
        posterior = model.encode(as_images(batch, binarize, draws))
        noise = model.noise(tuple(posterior[0].shape), draws)
        latents.append(model.sample(posterior, noise, model.default_temperature).cpu())
    return torch.cat(latents)
