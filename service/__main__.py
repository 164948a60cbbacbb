"""reparam serve [--help]"""

import logging.config
import os
import sys
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from reparam.service.process.workers import run
from reparam.service.runtime.devices import DeviceError, device_of
from reparam.service.settings import Settings
from reparam.service.telemetry.logs import log_config

log = logging.getLogger(__name__)

FOR_CLIENTS = {"REPARAM_URL"}


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends the process.

    argv: `serve` and its options; default: those of the process.

    Returns the exit status.
    """
    options = (sys.argv[1:] if argv is None else list(argv))[1:]
    try:
        settings = CliApp.run(Settings, cli_args=options)
    except (ValidationError, SettingsError) as error:
        sys.exit(_explain(error))
    try:
        workers = device_of(settings).workers
    except DeviceError as error:
        sys.exit(str(error))
    logging.config.dictConfig(log_config(settings))
    if unknown := _unknown_in_the_environment():
        log.warning("no settings, and ignored: `reparam serve --help` lists those there are", extra={"names": unknown})
    return run(settings, workers)


def _unknown_in_the_environment() -> list[str]:
    """What looks like a setting. Not refused: Kubernetes and Docker have variables of their own for a service that is
    called reparam."""
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


if __name__ == "__main__":  # as `python -m service` in a checkout
    sys.exit("the service is started by `reparam serve`, or `python -m reparam serve`")
