"""Commands of the client: `reparam sample` and `reparam models`."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.lib import format as npy

from reparam._client import DEFAULT_URL, Client
from reparam._errors import ReparamError
from reparam._files import check_place, replacing
from reparam._options import CHECKS
from reparam._samples import DTYPES, SUFFIXES, Samples
from reparam._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. A failure prints one line on stderr.

    argv: the command and its options; default: the arguments of the process.

    Returns: the exit status: 0, 1 for a failure, 130 after Ctrl-C.

    Raises: SystemExit with status 2 for wrong usage, 143 after SIGTERM.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _exit)
    try:
        with Client(arguments.url, arguments.api_key, timeout=arguments.timeout) as client:
            arguments.command(client, arguments)
    except ValueError as error:
        parser.error(str(error))
    except (ReparamError, OSError) as error:
        print(f"reparam: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # status of an interrupted command in a shell
    return 0


def _exit(number: int, frame: object) -> None:
    """Exit by an exception, so that unfinished files are removed."""
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reparam", description="Sample a served VAE.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    sample = commands.add_parser("sample", help="write samples to a file", description="Write samples to a file.")
    _add_sample_arguments(sample)
    models = commands.add_parser("models", help="list the models", description="List the models, the default first.")
    models.set_defaults(command=_models)
    for command in (sample, models):
        command.add_argument("--url", default=_default_url(), help="default: REPARAM_URL, or " + DEFAULT_URL)
        command.add_argument("--api-key", default=os.environ.get("REPARAM_API_KEY"), help="default: REPARAM_API_KEY")
        command.add_argument(
            "--timeout", type=float, default=60.0, help="seconds; for .npy of each wait (default: %(default)s)"
        )
    return parser


def _add_sample_arguments(sample: argparse.ArgumentParser) -> None:
    sample.set_defaults(command=_sample)
    sample.add_argument("-n", type=int, default=1, help="number of rows (default: %(default)s)")
    sample.add_argument(
        "-o", dest="path", type=Path, required=True, metavar="FILE",
        help="*.png a contact sheet, *.npy an array, streamed, so it may be larger than memory, *.npz several arrays",
    )  # fmt: skip
    sample.add_argument("--model", help="default: the service's default model")
    sample.add_argument("--version", type=int, help="version of the model (default: the latest)")
    sample.add_argument("--temperature", type=float, help="default: the model's")
    sample.add_argument("--hard", action="store_true", default=None, help="one-hot codes at any temperature (Gumbel)")
    sample.add_argument("--prior", choices=("mixture", "standard"), help="default: the mixture where the model has one")
    sample.add_argument("--seed", type=int, help="default: a fresh seed, which is printed")
    sample.add_argument("--start", type=int, default=0, help="first row of the seed (default: %(default)s)")
    sample.add_argument(
        "--output",
        dest="outputs",
        action="append",
        choices=DTYPES,
        help="output to write; may be repeated for .npz (default: images)",
    )


def _default_url() -> str:
    return os.environ.get("REPARAM_URL", DEFAULT_URL)


def _sample(client: Client, arguments: argparse.Namespace) -> None:
    path, outputs = arguments.path, arguments.outputs or ["images"]
    if path.suffix not in SUFFIXES:
        raise ValueError(f"-o must end in {', '.join(SUFFIXES)}, got {str(path)!r}")
    check_place(path)
    if path.suffix != ".npz" and len(outputs) > 1:
        raise ValueError(f"{path.suffix} holds one output, got {', '.join(outputs)}; write a .npz")
    if path.suffix == ".png" and outputs != ["images"]:
        raise ValueError(f".png holds images, got {outputs[0]}; write a .npy")
    n, options = arguments.n, {name: value for name, value in vars(arguments).items() if name in CHECKS}
    if path.suffix == ".npy":
        samples = _stream(client, path, n, outputs[0], options)
    else:
        samples = client.sample(n, outputs=outputs, **options)
        samples.save(path)
    origin = {"model": samples.model, "version": samples.version, "seed": samples.seed}
    url = None if arguments.url == _default_url() else arguments.url
    words = {"n": n, **options, **origin, "output": arguments.outputs, "url": url, "o": str(path)}
    print(f"{path}: {n:,} rows of {samples.model}; the same again:\nreparam sample {_as_words(words)}")


def _stream(client: Client, path: Path, n: int, output: str, options: dict[str, Any]) -> Samples:
    """Write a .npy file while the rows arrive.

    output: name of the output to write.
    options: options of `Client.iter_samples`.

    Returns: the last batch, for model, version and seed.
    """
    with replacing(path) as file:
        for batch in client.iter_samples(n, output=output, **options):
            rows = batch.outputs[output]
            if not file.tell():
                shape = (n, *rows.shape[1:])
                header = {"descr": npy.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(file, header)
            file.write(rows.data)
    return batch


def _as_words(arguments: dict[str, Any]) -> str:
    """Write arguments as options of a shell command, without arguments that are None."""
    words: list[str] = []
    for name, value in arguments.items():
        option = f"--{name}" if len(name) > 1 else f"-{name}"
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                words += [option] if each is True else [option, str(each)]
    return shlex.join(words)


def _models(client: Client, arguments: argparse.Namespace) -> None:
    table = [("name", "version", "kind", "latent", "image", "temperature")]
    for model in client.models():
        latent, image = ("x".join(map(str, shape)) for shape in (model.latent_shape, model.image_shape))
        table.append((model.name, str(model.version), model.kind, latent, image, f"{model.default_temperature:g}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
