"""reparam train|fit-prior|evaluate|classifier|quality|publish|inspect|verify [--help]"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliSubCommand, SettingsConfigDict, SettingsError

from reparam.export.config import Device, TrainConfig
from reparam.export.errors import ExportError, RunError
from reparam.export.recipes import recipe
from reparam.service.artifact.contract import ArtifactError, Precision

# torch is imported by the commands that train, so that `inspect` and `verify` run without it.


Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Command(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Train(TrainConfig):
    """Train a VAE on images. Weights, metrics and contact sheets go into a folder, safely after every epoch."""

    kind: CliPositionalArg[Literal["gaussian", "gumbel"] | None] = None  # type: ignore[assignment]  # a recipe has it
    """gaussian or gumbel; a recipe has it."""
    data: str | None = None  # type: ignore[assignment]  # and this
    """`digits`, an .npz, a folder of IDX files (MNIST family) or of .amat files (static MNIST), or a folder of
    pictures."""
    recipe: str | None = None
    """Take from here what no option says: a file in export/recipes."""
    out: Path
    """Folder of the run, as in runs/NAME."""
    resume: bool = False
    """Continue a run that was interrupted, to the same result. It knows how it was started, but for sheet-every."""
    sheet_every: PositiveInt = 5
    """Epochs between two contact sheets."""

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        return self  # with the recipe's fields

    def cli_cmd(self) -> None:
        fields = (recipe(self.recipe) if self.recipe else {}) | self._begun()
        fields |= {key: value for key, value in self if key in TrainConfig.model_fields.keys() & self.model_fields_set}
        config = TrainConfig(**fields)

        from reparam.export.train import train

        train(config, self.out, resume=self.resume, sheet_every=self.sheet_every)
        print(f"{self.out} is trained; next: reparam evaluate {self.out}")

    def _begun(self) -> dict[str, Any]:
        """How a run that goes on was started. Raises RunError if there is none, nor anything to start one by."""
        if not self.resume or (not (self.out / "config.json").exists() and (self.kind or self.recipe)):
            return {}

        from reparam.export.run import Run

        return Run(self.out).config().train.model_dump()


class FitPrior(Command):
    """Fit a mixture to the latents of the training images, as the prior to sample from; nothing is trained anew."""

    run: CliPositionalArg[Path]
    """Folder of the run."""
    components: PositiveInt | None = None
    """Of the mixture; default: one of every 200 training images, at most 50."""
    seed: Seed = 0
    """Of the draws and of where the fit begins."""

    def cli_cmd(self) -> None:
        from reparam.export.prior import fit_prior

        densities = fit_prior(self.run, components=self.components, seed=self.seed)
        for name, value in densities.items():
            print(f"log p(z) of held-out latents, {name} prior: {value:.3f} nats")
        gain = densities["mixture"] - densities["standard"]
        if gain > 0:
            print(f"the mixture gains {gain:.3f} nats; next: reparam evaluate {self.run}")
        else:
            print("the mixture gains nothing and is not kept; fewer --components, or more training, may help")


class Evaluate(Command):
    """Bounds on log p(x) of the held-out images, in nats."""

    run: CliPositionalArg[Path]
    """Folder of the run."""
    samples: PositiveInt = 100
    """m of the importance-weighted bound."""
    images: PositiveInt | None = None
    """How many of the held-out images; default: all."""
    seed: Seed = 0
    """Of the draws."""
    device: Device | None = None
    """Where it computes, each with draws of its own. Default: on a GPU if torch finds one."""

    def cli_cmd(self) -> None:
        from reparam.export.evaluate import evaluate, read_evaluation
        from reparam.export.run import Run

        found = evaluate(self.run, samples=self.samples, rows=self.images, seed=self.seed, device=self.device)
        for key, value in found.items():
            print(f"{key:22} {value:.4f}" if isinstance(value, float) else f"{key:22} {value}")
        if (kept := read_evaluation(Run(self.run))) != found:
            print(f"{self.run} keeps, and publishes, one by more latents: m {kept['m']}, {kept['images']} images")


class Quality(Command):
    """How far samples are from held-out images, in the features of a classifier, and whether they are copies."""

    source: CliPositionalArg[Path]
    """Folder of a run, or an .npy file of images, as `reparam sample -o` writes it."""
    classifier: Path
    """Folder of one that `classifier` has trained on such images."""
    samples: Annotated[int, Field(ge=100)] = 10_000
    """Images drawn from each prior of a run; of a file all count."""
    data: str | None = None
    """The images that those of an .npy file are compared with; a run knows its own."""
    seed: Seed = 0
    """Of the draws."""

    def cli_cmd(self) -> None:
        from reparam.export.quality import quality, quality_of_images

        if self.source.suffix.lower() != ".npy":
            if self.data is not None:
                raise RunError(f"{self.source} is no .npy file, and a run knows its images: leave out --data")
            found = quality(self.source, classifier=self.classifier, samples=self.samples, seed=self.seed)
        elif self.data is None or "samples" in self.model_fields_set:
            raise RunError(f"all images of {self.source} count: say --data to compare them with, and no --samples")
        else:
            found = quality_of_images(self.source, data=self.data, classifier=self.classifier, seed=self.seed)
        for key, value in found.items():
            print(f"{key:30} {value:.4f}")


class Classifier(Command):
    """Train a small classifier on images with labels, for `quality`."""

    data: str
    """`digits`, or a folder of IDX files with labels."""
    out: Path
    """Its folder."""
    epochs: PositiveInt = 5
    """Passes over the training images."""
    seed: Seed = 0
    """Of the initial weights and of every draw."""

    def cli_cmd(self) -> None:
        from reparam.export.classifier import train_classifier

        accuracy = train_classifier(self.data, self.out, epochs=self.epochs, seed=self.seed)
        print(f"{self.out}: {accuracy:.2%} of the held-out images are put right")


class Publish(Command):
    """Export a run to ONNX, compare it with the network, and add it to the model repository as the next version."""

    run: CliPositionalArg[Path]
    """Folder of the run."""
    name: str
    """Name of the model."""
    artifacts: Path = Path("artifacts")
    """The model repository."""
    precision: Precision = "float32"
    """What the decoder computes in. float16 halves it, for GPUs; on a CPU it is no faster; images then differ by up to
    0.02. Latents are float32."""

    def cli_cmd(self) -> None:
        from reparam.export.publish import publish_run

        print("exporting both graphs, then comparing them with the network ...", flush=True)
        print(f"published {publish_run(self.run, self.name, self.artifacts, self.precision)}")


class Inspect(Command):
    """What an artifact says of itself: contract, prior, sizes, evaluation."""

    artifact: CliPositionalArg[Path]
    """Folder of one version, as artifacts/NAME/1."""

    def cli_cmd(self) -> None:
        from reparam.export.inspect import inspect

        print(inspect(self.artifact))


class Verify(Command):
    """Repeat the checks of publication that need no torch."""

    artifact: CliPositionalArg[Path]
    """Folder of one version, as artifacts/NAME/1."""

    def cli_cmd(self) -> None:
        from reparam.export.verify import verify

        for line in verify(self.artifact):
            print(f"ok: {line}")


class Export(BaseSettings):
    """Train, evaluate, publish and inspect VAE samplers."""

    model_config = SettingsConfigDict(
        cli_prog_name="reparam",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_enforce_required=True,
        env_prefix="REPARAM_EXPORT_",
        use_attribute_docstrings=True,
    )

    train: CliSubCommand[Train] = Field(description="train a VAE on images")
    fit_prior: CliSubCommand[FitPrior] = Field(description="fit a mixture to the latents, as the prior to sample from")
    evaluate: CliSubCommand[Evaluate] = Field(description="bounds on log p(x) of the held-out images")
    classifier: CliSubCommand[Classifier] = Field(description="train the classifier that quality is measured with")
    quality: CliSubCommand[Quality] = Field(description="how far samples are from held-out images")
    publish: CliSubCommand[Publish] = Field(description="export a run and add it to the model repository")
    inspect: CliSubCommand[Inspect] = Field(description="what an artifact says of itself")
    verify: CliSubCommand[Verify] = Field(description="check an artifact, without torch")

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of `reparam` that trains or publishes.

    argv: the command and its options; default: those of the process.

    Returns the exit status 0; a failure ends the process with a message.
    """
    try:
        CliApp.run(Export, cli_args=sys.argv[1:] if argv is None else list(argv))
    except ValidationError as error:
        sys.exit("\n".join(_explain(item["type"], item["loc"], item["input"], item["msg"]) for item in error.errors()))
    except (ExportError, ArtifactError, SettingsError, OSError) as error:
        sys.exit(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        sys.exit(f"not enough memory: {str(error).partition(chr(10))[0]}")
    except KeyboardInterrupt:
        sys.exit("interrupted; `train --resume` with the same --out, or the same `evaluate`, goes on where it was")
    return 0


def _explain(kind: str, location: tuple[int | str, ...], given: object, says: str) -> str:
    """The option that a fault of the configuration lies in, the last name on the way to it; if it is in one alone."""
    says = says.removeprefix("Value error, ")  # pydantic's, before our own words
    names = [part for part in location if isinstance(part, str)]
    if not names:
        return says
    name = names[-1].replace("_", "-")
    return f"{name} is missing: --help says what it is" if kind == "missing" else f"--{name} {given!r}: {says}"


if __name__ == "__main__":  # as `python -m export` in a checkout
    sys.exit("the commands are those of `reparam`, as in `reparam train --help`")
