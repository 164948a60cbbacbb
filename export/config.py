"""The configuration of a training run."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

WIDTHS: dict[str, tuple[int, ...]] = {"mlp": (512, 256), "conv": (32, 64, 64)}
LATENT_SHAPES: dict[str, tuple[int, ...]] = {"gaussian": (20,), "gumbel": (20, 10)}

Device = Literal["cpu", "cuda"]


class TrainConfig(BaseModel):
    """All settings with an effect on the trained weights. Only the images are not part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Literal["gaussian", "gumbel"]
    """Kind of latent."""
    data: str
    """`digits`, an .npz, a folder of IDX files (MNIST family) or of .amat files (static MNIST), or a folder of
    pictures.
    """
    body: Literal["mlp", "conv"] = "conv"
    """Network between images and latent."""
    width: tuple[PositiveInt, ...] | None = None
    """Hidden sizes (mlp; may be empty) or channels (conv), from the image towards the latent. Default: 512,256 or
    32,64,64.
    """
    decoder_width: tuple[PositiveInt, ...] | None = None
    """Hidden sizes of the decoder (mlp), also from the image towards the latent. Default: same as width."""
    dense: tuple[PositiveInt, ...] = ()
    """Hidden sizes between the convolutions and the latent (conv)."""
    activation: Literal["relu", "tanh"] = "relu"
    """Function between the layers."""
    latent_shape: Annotated[tuple[PositiveInt, ...], Field(max_length=8)] | None = None
    """Gaussian: any shape, default 20. Gumbel: variables, categories, default 20,10."""
    prior_components: PositiveInt = 1
    """Components of the prior. From 2 on a mixture, learned with the weights; 1: N(0, I), or learned independent
    categories.
    """
    binarize: bool = True
    """Draw each pixel from its grey value in every epoch (dynamic binarization). Without it grey values enter the
    Bernoulli likelihood as they are, and the bound is not a bound on log p(x).
    """
    epochs: PositiveInt = 30
    """Passes over the training images."""
    batch_size: PositiveInt = 128
    """Images per step."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of Adam at the first step; decays to 0 along a cosine."""
    objective: Literal["elbo", "iwae", "dreg", "vimco"] = "elbo"
    """Bound to maximize. elbo: the evidence lower bound. iwae: the importance-weighted bound (Gaussian). dreg: iwae
    with the doubly reparameterized gradient (Gaussian). vimco: the importance-weighted bound of one-hot codes (Gumbel).
    """
    samples: PositiveInt = 1
    """Latents drawn for each image."""
    resampled: int = Field(default=0, ge=0)
    """Number of latents with a gradient, resampled by importance weight (iwae, dreg): the same gradient on average, and
    faster. 0: all.
    """
    kl_warm_up: int = Field(default=1, ge=0)
    """Epochs over which the weight of the KL term rises from 0 to 1."""
    free_bits: float = Field(default=0.0, ge=0)
    """Nats of KL that each latent variable may carry at no cost (elbo)."""
    straight_through: bool = False
    """Gumbel: decode one-hot codes in training, with the gradient of the relaxed codes."""
    elbo_epochs: int = Field(default=0, ge=0)
    """First epochs that maximize the ELBO with one latent per image (relaxed if a code), before another objective or
    straight_through begins.
    """
    average: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the exponential moving average of the weights; the average is evaluated and published. The first steps
    use a smaller decay. 0: no average.
    """
    tau_start: PositiveFloat = 1.0
    """Gumbel: temperature of the relaxation at step 0."""
    tau_min: PositiveFloat = 0.5
    """Gumbel: the lowest temperature."""
    tau_rate: float = Field(default=1e-4, ge=0)
    """Gumbel: the temperature at step t is max(tau_min, tau_start * exp(-tau_rate * t))."""
    tau_every: PositiveInt = 500
    """Gumbel: t is rounded down to a multiple of this many steps."""
    shares: PositiveInt | None = None
    """Parts of a batch computed at the same time, each with its own draws. Default: one per core, with at least 64
    latents each; 1 on a GPU and with free_bits.
    """
    device: Device | None = None
    """Device of the training. Draws differ between devices. Default: a GPU if torch finds one."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the initial weights and of every draw."""

    @property
    def equal_prior_epochs(self) -> int:
        """First epochs in which all components of a mixture stay equal.

        If components differ from the first step on, the first component to resemble the images takes all images. Most
        other components then never get an image.
        """
        return max(1, self.kl_warm_up)

    @property
    def latent(self) -> tuple[int, ...]:
        """Shape of a latent."""
        return self.latent_shape or LATENT_SHAPES[self.kind]

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        if self.kind == "gumbel" and self.objective in ("iwae", "dreg"):
            raise ValueError(f"objective {self.objective!r} needs a latent with a density: use kind gaussian")
        if self.objective == "vimco" and (self.kind == "gaussian" or self.samples < 2):
            raise ValueError("objective 'vimco' needs a Gumbel latent, and compares samples: at least 2")
        if self.resampled and self.objective not in ("iwae", "dreg"):
            raise ValueError("resampled needs objective 'iwae' or 'dreg': leave resampled out, or set 0")
        if self.resampled and self.resampled >= self.samples:
            raise ValueError(
                f"resampled is {self.resampled} of {self.samples} samples: choose a smaller number, or 0 for all"
            )
        if self.kind == "gaussian" and self.straight_through:
            raise ValueError("straight_through is for a Gumbel latent")
        if self.elbo_epochs and self.objective == "elbo" and not self.straight_through:
            raise ValueError(
                f"nothing follows the {self.elbo_epochs} elbo_epochs. Add another objective or straight_through, "
                "or leave out elbo_epochs"
            )
        if self.elbo_epochs >= self.epochs:
            raise ValueError(
                f"elbo_epochs are {self.elbo_epochs} of {self.epochs} epochs: leave some for the next objective"
            )
        if self.objective == "vimco" and self.straight_through:
            raise ValueError("straight_through relaxes codes, objective 'vimco' does not: leave out one or the other")
        if self.free_bits and (self.shares or 1) > 1:
            raise ValueError("free_bits use the mean over a whole batch: leave out shares")
        if self.prior_components > 1 and self.equal_prior_epochs >= self.epochs:
            raise ValueError(
                f"the {self.prior_components} prior_components stay equal for {self.equal_prior_epochs} of "
                f"{self.epochs} epochs: leave some for what follows"
            )
        if self.free_bits and self.prior_components > 1:
            raise ValueError("free_bits are counted by variable, which a mixture couples: leave out one or the other")
        if self.objective != "elbo" and self.free_bits:
            raise ValueError("free_bits needs objective 'elbo'")
        return self
