"""The commands of `reparam` that train and publish."""

import sys

if __name__ == "__main__":  # before the imports, which fail where the extra `export` is missing
    sys.exit("train and publish with `reparam train`, `reparam publish` ...; `reparam --help` lists the commands")

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSettingsSource,
    CliSubCommand,
    SettingsConfigDict,
    SettingsError,
)

from reparam._help import HelpFormatter
from reparam.export.config import Device, TrainConfig
from reparam.export.errors import ExportError, RunError
from reparam.export.recipes import recipe
from reparam.service.artifact.contract import ArtifactError, Precision

# Only the commands that train import torch: `inspect` and `verify` run without it.

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Command(BaseModel):
    """A command: its docstring is the help, its fields are the options."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Train(TrainConfig):
    """Train a VAE on images.

    Weights, metrics and contact sheets go into a folder, which is complete after every epoch.

    Example: reparam train gaussian --data digits --out runs/digits
    """

    kind: CliPositionalArg[Literal["gaussian", "gumbel"] | None] = None  # type: ignore[assignment]  # a recipe has it
    """gaussian or gumbel; a recipe has it."""
    data: str | None = None  # type: ignore[assignment]  # a recipe has it
    """`digits`, an .npz, a folder of IDX files (MNIST family) or of .amat files (static MNIST), or a folder of
    pictures."""
    recipe: str | None = None
    """Recipe that fills in the options left out: a file in export/recipes, as in --recipe gaussian-best."""
    out: Path
    """Folder of the run, as in runs/NAME."""
    resume: bool = False
    """Continue an interrupted run, to the same result. The run knows its options, except --sheet-every."""
    sheet_every: PositiveInt = 5
    """Epochs between two contact sheets."""

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        return self  # no check yet: fields may come from the recipe, so cli_cmd checks the complete TrainConfig

    def cli_cmd(self) -> None:
        fields = (recipe(self.recipe) if self.recipe else {}) | self._begun()
        fields |= {key: value for key, value in self if key in TrainConfig.model_fields.keys() & self.model_fields_set}
        config = TrainConfig(**fields)

        from reparam.export.train import train

        train(config, self.out, resume=self.resume, sheet_every=self.sheet_every)
        print(f"{self.out} is trained; next: reparam evaluate {self.out}")

    def _begun(self) -> dict[str, Any]:
        """Reads the options of the run that is resumed. Raises RunError if there is no run and no way to start one."""
        if not self.resume or (not (self.out / "config.json").exists() and (self.kind or self.recipe)):
            return {}

        from reparam.export.run import Run

        return Run(self.out).config().train.model_dump()


class FitPrior(Command):
    """Fit a mixture to the latents of the training images, as the prior to sample from. The weights stay as they are.

    Example: reparam fit-prior runs/digits
    """

    run: CliPositionalArg[Path]
    """Folder of the run."""
    components: PositiveInt | None = None
    """Components of the mixture. Default: one per 200 training images, at most 50."""
    seed: Seed = 0
    """Seed of the draws and of the initial components."""

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
    """Compute bounds on log p(x) of the held-out images, in nats.

    Example: reparam evaluate runs/digits --samples 500
    """

    run: CliPositionalArg[Path]
    """Folder of the run."""
    samples: PositiveInt = 100
    """Latents per image of the importance-weighted bound (m)."""
    images: PositiveInt | None = None
    """Number of held-out images. Default: all."""
    seed: Seed = 0
    """Seed of the draws."""
    device: Device | None = None
    """Device to compute on; each has draws of its own. Default: a GPU if torch finds one."""

    def cli_cmd(self) -> None:
        from reparam.export.evaluate import evaluate, read_evaluation
        from reparam.export.run import Run

        found = evaluate(self.run, samples=self.samples, rows=self.images, seed=self.seed, device=self.device)
        for key, value in found.items():
            print(f"{key:22} {value:.4f}" if isinstance(value, float) else f"{key:22} {value}")
        if (kept := read_evaluation(Run(self.run))) != found:
            print(f"{self.run} keeps, and publishes, one by more latents: m {kept['m']}, {kept['images']} images")


class Quality(Command):
    """Measure how far samples are from held-out images, in the features of a classifier, and whether they are copies.

    Example: reparam quality runs/digits --classifier runs/classifier
    """

    source: CliPositionalArg[Path]
    """Folder of a run, or an .npy file of images, as `reparam sample -o` writes it."""
    classifier: Path
    """Folder of a classifier that `reparam classifier` has trained on such images."""
    samples: Annotated[int, Field(ge=100)] = 10_000
    """Images drawn from each prior of a run; all images of a file count."""
    data: str | None = None
    """Images to compare an .npy file with; a run knows its own."""
    seed: Seed = 0
    """Seed of the draws."""

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
    """Train a small classifier on images with labels, for `reparam quality`.

    Example: reparam classifier --data digits --out runs/classifier
    """

    data: str
    """`digits`, or a folder of IDX files with labels."""
    out: Path
    """Folder of the classifier."""
    epochs: PositiveInt = 5
    """Passes over the training images."""
    seed: Seed = 0
    """Seed of the initial weights and of every draw."""

    def cli_cmd(self) -> None:
        from reparam.export.classifier import train_classifier

        accuracy = train_classifier(self.data, self.out, epochs=self.epochs, seed=self.seed)
        print(f"{self.out}: {accuracy:.2%} of the held-out images are classified correctly")


class Publish(Command):
    """Export a run to ONNX, compare it with the network, and add it to a folder of models as the next version.

    Example: reparam publish runs/digits --name digits
    """

    run: CliPositionalArg[Path]
    """Folder of the run."""
    name: str
    """Name of the model."""
    artifacts: Path = Path("artifacts")
    """Folder of models, which `reparam serve` serves."""
    precision: Precision = "float32"
    """Precision of the decoder. float16 halves its size, for GPUs; it is no faster on a CPU, and images differ by up to
    0.02. Latents are float32."""

    def cli_cmd(self) -> None:
        from reparam.export.publication import publish_run

        print("exporting both graphs, then comparing them with the network ...", flush=True)
        print(f"published {publish_run(self.run, self.name, self.artifacts, self.precision)}")


class Inspect(Command):
    """Print the contract, prior, sizes and evaluation of an artifact.

    Example: reparam inspect artifacts/digits/1
    """

    artifact: CliPositionalArg[Path]
    """Folder of one version, as artifacts/NAME/1."""

    def cli_cmd(self) -> None:
        from reparam.export.inspect import inspect

        print(inspect(self.artifact))


class Verify(Command):
    """Repeat the checks of `reparam publish` that need no torch.

    Example: reparam verify artifacts/digits/1
    """

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
    )

    train: CliSubCommand[Train]
    fit_prior: CliSubCommand[FitPrior]
    evaluate: CliSubCommand[Evaluate]
    classifier: CliSubCommand[Classifier]
    quality: CliSubCommand[Quality]
    publish: CliSubCommand[Publish]
    inspect: CliSubCommand[Inspect]
    verify: CliSubCommand[Verify]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command of `reparam` that trains or publishes.

    argv: the command and its options; default: those of the process.

    Returns: the exit status 0. A failure ends the process with 1, wrong usage with 2, both with a message.
    """
    options = sys.argv[1:] if argv is None else list(argv)
    try:
        CliApp.run(Export, options, CliSettingsSource(Export, formatter_class=HelpFormatter))
    except ValidationError as error:
        for item in error.errors():
            print(_explain(item["type"], item["loc"], item["input"], item["msg"]), file=sys.stderr)
        sys.exit(2)
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (ExportError, ArtifactError, OSError) as error:
        sys.exit(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        sys.exit(f"not enough memory: {str(error).partition(chr(10))[0]}")
    except KeyboardInterrupt:
        sys.exit("interrupted; `reparam train --resume` with the same --out, or the same `reparam evaluate`, continues")
    return 0


def _explain(kind: str, location: tuple[int | str, ...], given: object, says: str) -> str:
    """Says what is wrong with an option.

    location: the path of the field in the command; the last name is the option. Empty if several options disagree.
    """
    says = says.removeprefix("Value error, ")  # pydantic's prefix of our own messages
    names = [part for part in location if isinstance(part, str)]
    if not names:
        return says
    name = names[-1].replace("_", "-")
    return f"{name} is missing: --help describes it" if kind == "missing" else f"--{name} {given!r}: {says}"
