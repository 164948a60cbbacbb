"""The command `reparam serve`."""

import sys

if __name__ == "__main__":  # before the imports, which fail where the extra `serve` is missing
    sys.exit("start the service with `reparam serve`, or `python -m reparam serve`")

import logging.config
import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError

from reparam._help import HelpFormatter
from reparam.service.process.workers import run
from reparam.service.runtime.devices import DeviceError, device_of
from reparam.service.settings import DEMO_MODELS, Settings
from reparam.service.telemetry.logs import log_config

log = logging.getLogger(__name__)

FOR_CLIENTS = {"REPARAM_URL"}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends the process. Wrong settings end the process with 2.

    argv: `serve` and its options; default: those of the process.

    Returns: the exit status.
    """
    settings = _settings((sys.argv[1:] if argv is None else list(argv))[1:])
    try:
        workers = device_of(settings).workers
    except DeviceError as error:
        sys.exit(str(error))
    logging.config.dictConfig(log_config(settings))
    if unknown := _unknown_in_the_environment():
        log.warning("no settings, and ignored: `reparam serve --help` lists the settings", extra={"names": unknown})
    log.info("model repository", extra={"folder": str(settings.artifacts.absolute()), "reason": _reason(settings)})
    return run(settings, workers)


def _settings(options: Sequence[str]) -> Settings:
    """Reads the command line and the environment. Ends the process if they are wrong."""
    parser = ArgumentParser("reparam serve", description=Settings.__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="short for --artifacts FOLDER")
    source: CliSettingsSource[ArgumentParser] = CliSettingsSource(Settings, root_parser=parser)
    given = parser.parse_args(options)
    if given.folder is not None:
        if "artifacts" in given:
            parser.error(f"leave out {given.folder} or --artifacts: both name the folder of models")
        given.artifacts = given.folder
    del given.folder
    try:
        return CliApp.run(Settings, cli_args=given, cli_settings_source=source)
    except (ValidationError, SettingsError) as error:
        print(_explain(error), file=sys.stderr)  # noqa: T201  # there is no log before there are settings
        sys.exit(2)


def _reason(settings: Settings) -> str:
    """Says why these models are served and no others."""
    if "artifacts" in settings.model_fields_set:
        return "chosen by --artifacts or REPARAM_ARTIFACTS"
    if settings.artifacts == DEMO_MODELS:
        return f"the demo models, because there is no {Path('artifacts').absolute()}"
    return "artifacts in the working directory"


def _unknown_in_the_environment() -> list[str]:
    """Lists variables that look like a setting.

    They are not refused: Kubernetes and Docker set variables for a service that is called reparam.
    """
    known = {f"REPARAM_{name.upper()}" for name in Settings.model_fields} | FOR_CLIENTS
    return sorted(name for name in os.environ if name.upper().startswith("REPARAM_") and name.upper() not in known)


def _explain(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return f"{error}\n`reparam serve --help` lists every setting"
    lines = []
    for item in error.errors():
        name = "_".join(str(part) for part in item["loc"])
        shown = "(secret)" if name == "api_key" else repr(item["input"])
        lines.append(
            f"--{name.replace('_', '-')} or REPARAM_{name.upper()}={shown}: {item['msg'].removeprefix('Value error, ')}"
        )
    return "\n".join([*lines, "`reparam serve --help` lists every setting"])
