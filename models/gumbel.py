"""VAE with a categorical latent, trained through the Gumbel-Softmax relaxation
(Jang, Gu and Poole, 2017, https://arxiv.org/abs/1611.01144; Maddison, Mnih and Teh, 2017, https://arxiv.org/abs/1611.00712).
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from reparam.models.bodies import VAEConfig, decoder, encoder
from reparam.models.mixture import Mixture, learn_weights

Parameters = tuple[Tensor, ...]  # logits: (n, D, K)
MIN_TEMPERATURE = torch.finfo(torch.float32).tiny  # at lower temperatures codes are one-hot
SIMD_WIDTH = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8  # float32 numbers in a CPU vector
MIN_PROBABILITY = 1e-5  # floor of a category's probability in a learned prior


class GumbelVAE(nn.Module):
    """VAE with a categorical latent of D variables with K categories.

    p(z): independent categories with learned logits, or a learned mixture of such distributions.
    q(z | x): softmax(logits(x)) for each variable.
    p(x | z): independent Bernoulli pixels.

    config: architecture of encoder, decoder and prior; latent_shape is (D, K).

    Raises: ValueError for another latent_shape.
    """

    kind: ClassVar[Literal["gumbel"]] = "gumbel"
    parameter_names: ClassVar = ("logits",)
    default_temperature: ClassVar = 0.0

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if len(config.latent_shape) != 2:
            raise ValueError(f"a Gumbel latent has the shape D x K, got {list(config.latent_shape)}")
        self.config = config
        self.encoder = encoder(config, prod(config.latent_shape))
        self.decoder = decoder(config)
        self.prior_weights = nn.Parameter(torch.zeros(config.prior_components))
        shape = (config.prior_components, *config.latent_shape)
        self.prior_logits = nn.Parameter(torch.zeros(shape))

    def prior(self) -> Mixture:
        """The prior p(z) as a mixture of `prior_components` components."""
        return Mixture(self.prior_weights.log_softmax(0), (self.prior_logits,))

    @torch.no_grad()
    def learn_prior(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Update the prior's probabilities by the natural gradient (Amari, 1998).

        The parameters are logits: component c has the weight pi_c = softmax(prior_weights)_c, and the probabilities
        p_c = softmax(prior_logits_c) over the categories. The update is made on weights and probabilities, and stored
        as logarithms. g_pi and g_logits are the gradients of the loss by prior_weights and prior_logits:

            pi_c <- max(pi_c - rate * g_pi, MIN_WEIGHT),
            p_c  <- max(p_c - rate / pi_c * g_logits, MIN_PROBABILITY).

        The gradient of the KL term by the logits is p(z) minus the mean of q(z | x) over the batch. So p(z) becomes a
        running mean of q(z | x), where the KL term has its minimum. With VIMCO, p(z) becomes the mean of the
        importance-weighted codes. In a mixture, each component averages the images in its responsibility: online
        expectation maximization (Cappe and Moulines, 2009). A variable below its free bits has no gradient and keeps
        its prior.

        Adam's step sizes are too small here. An encoder may permute the categories of a variable, and p(z) then
        follows too slowly. The KL term drives such a variable to carry no information.

        gradients: g_pi (C,) and g_logits (C, D, K).
        rate: weight of this batch in the running mean, divided by the weight of the KL term.
        """
        weights_grad, logits_grad = gradients
        weights = learn_weights(self.prior_weights, weights_grad, rate).reshape(-1, 1, 1)
        prior = _over_categories(torch.softmax, self.prior_logits) - rate / weights * logits_grad
        self.prior_logits.copy_(prior.clamp_min(MIN_PROBABILITY).log())

    @torch.no_grad()
    def set_prior(self, prior: Mixture) -> None:
        """Replace p(z) by a mixture with the same number of components and the same latent_shape."""
        self.prior_weights.copy_(prior.log_weights)
        (logits,) = prior.parameters
        self.prior_logits.copy_(logits)

    def encode(self, images: Tensor) -> Parameters:
        """Compute the parameters of q(z | x).

        images: (n, C, H, W), float32 in [0, 1].

        Returns: logits (n, D, K), in a tuple.
        """
        return (self.encoder(images).unflatten(1, self.config.latent_shape),)

    def decode(self, latents: Tensor) -> Tensor:
        """Compute pixel logits: codes (n, D, K), one-hot or relaxed -> (n, C, H, W)."""
        return self.decoder(latents)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    @staticmethod
    def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw standard Gumbel numbers of this shape, float32, on the generator's device.

        The formula -log(-log(1 - u)) runs in float64, where a small u keeps all digits.
        """
        u = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).clamp_min(2.0**-54)
        return -torch.log(-torch.log1p(-u)).float()

    @staticmethod
    def sample(parameters: Parameters, noise: Tensor, temperature: Tensor | float) -> Tensor:
        """Draw codes: softmax((logits + noise) / temperature) over the categories.

        At temperature 0 the limit one_hot(argmax(logits + noise)), an exact categorical draw (Gumbel-Max).

        parameters: logits (n, D, K), in a tuple.
        noise: (n, D, K), standard Gumbel; (..., n, D, K) if temperature is a float.
        temperature: (n,), or a float for all rows.

        Returns: codes of noise's shape.
        """
        (logits,) = parameters
        # Subtract the maxima, so that large logits do not round away the noise. Softmax ignores the shift: no gradient.
        scores = logits - logits.detach().amax(-1, keepdim=True) + noise
        scores = scores - scores.detach().amax(-1, keepdim=True)
        if not isinstance(temperature, Tensor):
            return _relaxed(scores, temperature) if temperature >= MIN_TEMPERATURE else _one_hot(scores)
        temperature = temperature.reshape(-1, 1, 1)
        relaxes = temperature >= MIN_TEMPERATURE
        return torch.where(relaxes, _relaxed(scores, torch.where(relaxes, temperature, 1.0)), _one_hot(scores))

    @staticmethod
    def log_prob(latents: Tensor, parameters: Parameters) -> Tensor:
        """Log probability of one-hot codes.

        latents: one-hot codes (n, D, K).
        parameters: logits (n, D, K), in a tuple.

        Returns: (n,), in nats.
        """
        (logits,) = parameters
        return (latents * _over_categories(torch.log_softmax, logits)).flatten(1).sum(1)

    @staticmethod
    def pairwise_log_prob(latents: Tensor, parameters: Parameters) -> Tensor:
        """Log probability of each code under each of C distributions.

        latents: codes (n, D, K), one-hot. For probabilities instead of codes, the result is the mean over their draws.
        parameters: logits of the C distributions, (C, D, K), in a tuple.

        Returns: (n, C), in nats.
        """
        (logits,) = parameters
        return latents.flatten(1) @ _over_categories(torch.log_softmax, logits).flatten(1).T

    @staticmethod
    def kl(posterior: Parameters, prior: Parameters) -> Tensor:
        """KL(posterior || prior) of each variable, between the categories rather than their relaxations.

        Uses log-softmax instead of log(p + eps), so rare categories stay exact.

        posterior: logits (n, D, K), in a tuple.
        prior: logits (n, D, K), or (1, D, K) for all rows, in a tuple.

        Returns: (n, D), in nats.
        """
        log_q, log_p = (_over_categories(torch.log_softmax, logits) for logits in (posterior[0], prior[0]))
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    @staticmethod
    def pairwise_kl(posterior: Parameters, prior: Parameters) -> Tensor:
        """KL(posterior || prior) of each posterior and each of C priors, summed over variables.

        posterior: logits (n, D, K), in a tuple.
        prior: logits of the C priors, (C, D, K), in a tuple.

        Returns: (n, C), in nats.
        """
        log_q = _over_categories(torch.log_softmax, posterior[0])
        q = log_q.exp()
        return (q * log_q).flatten(1).sum(1, keepdim=True) - GumbelVAE.pairwise_log_prob(q, prior)

    @staticmethod
    def nearest(mixture: Mixture) -> Parameters:
        """The independent variables g with the smallest KL(mixture || g): the mixture's probability of each category.

        Returns: logits (D, K), in a tuple.
        """
        (logits,) = mixture.parameters
        return ((mixture.log_weights.reshape(-1, 1, 1) + logits.log_softmax(-1)).logsumexp(0),)

    @staticmethod
    def most_likely(latents: Tensor, weights: Tensor) -> Parameters:
        """Most likely parameters for weighted codes, with half a count added to each category.

        The added count (Krichevsky and Trofimov, 1981) keeps every category possible.

        latents: one-hot codes (n, D, K).
        weights: (n, C), at least 0: weight of each code for each of C distributions.

        Returns: normalized logits (C, D, K), in a tuple.
        """
        counts = torch.einsum("nc,ndk->cdk", weights, latents) + 0.5
        return (counts.log() - counts.sum(-1, keepdim=True).log(),)


def _relaxed(scores: Tensor, temperature: Tensor | float) -> Tensor:
    return _over_categories(torch.softmax, scores / temperature)


def _one_hot(scores: Tensor) -> Tensor:
    categories = torch.arange(scores.shape[-1], device=scores.device)
    return (scores.argmax(-1, keepdim=True) == categories).to(scores.dtype)


def _over_categories(function: Callable[[Tensor, int], Tensor], logits: Tensor) -> Tensor:
    """Apply softmax or log_softmax over the last axis.

    On a CPU, rows shorter than SIMD_WIDTH take three to nine times as long as columns, so short rows are transposed.
    """
    if logits.shape[-1] >= SIMD_WIDTH or logits.is_cuda or torch.compiler.is_exporting():
        return function(logits, -1)
    return function(logits.transpose(-1, -2).contiguous(), -2).transpose(-1, -2)
