"""The command line: `reparam COMMAND`. Only the chosen command's module is imported, with the packages of its extra."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A command of `reparam`.

    module: name of a module with a function `main(argv)`; argv is the command and its options.
    extra: optional dependencies of this distribution imported by the command; "" for no extra.
    help: line of `reparam --help`.
    """

    module: str
    extra: str
    help: str


_SDK, _SERVICE, _EXPORT = "reparam._cli", "reparam.service.__main__", "reparam.export.__main__"
GROUPS = {
    "Sample a service": {
        "sample": Command(_SDK, "", "write samples of a served model to a file"),
        "models": Command(_SDK, "", "list the models of a service"),
    },
    "Serve": {
        "serve": Command(_SERVICE, "serve", "serve a folder of models over HTTP"),
    },
    "Train": {
        "train": Command(_EXPORT, "export", "train a VAE on images"),
        "fit-prior": Command(_EXPORT, "export", "fit a mixture to the latents, as the prior to sample from"),
        "evaluate": Command(_EXPORT, "export", "compute bounds on log p(x) of the held-out images"),
        "classifier": Command(_EXPORT, "export", "train the classifier that `quality` compares images with"),
        "quality": Command(_EXPORT, "export", "measure how far samples are from held-out images"),
    },
    "Publish": {
        "publish": Command(_EXPORT, "export", "export a run to ONNX and add it to a folder of models"),
        "inspect": Command(_EXPORT, "artifact", "print the contract, sizes and evaluation of an artifact"),
        "verify": Command(_EXPORT, "artifact", "check an artifact, without torch"),
    },
}
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    argv: the words after `reparam`; default: the arguments of the process.

    Returns: the exit status: 0, 1 for a failure, 2 for wrong usage.

    Raises: SystemExit from the command, with the exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(_help(), file=sys.stderr)
        return 2
    name = words[0]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        from reparam._version import __version__

        print(__version__)
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(_unknown(name), file=sys.stderr)
        return 2
    try:
        status: int = import_module(command.module).main(words)
    except ModuleNotFoundError as error:
        if not command.extra or (error.name or "").startswith("reparam"):
            raise
        print(f"reparam {name} needs the package {error.name}: pip install 'reparam[{command.extra}]'", file=sys.stderr)
        return 1
    return status


def _unknown(name: str) -> str:
    nearest = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "`reparam --help` lists the commands"
    return f"reparam: unknown command {name!r}; {hint}"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: reparam COMMAND [options]", "", "Train, publish, serve and sample variational autoencoders."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {command.help}" for name, command in commands.items())]
    return "\n".join(
        [
            *lines,
            "",
            "`reparam COMMAND --help` has the options of a command. Examples:",
            "  reparam serve",
            "  reparam sample -n 64 -o grid.png",
        ]
    )
