"""python -m service [--help]"""

import logging.config
import os
import sys

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from service.devices import DeviceError, device_of
from service.logs import log_config
from service.settings import Settings
from service.workers import run

log = logging.getLogger(__name__)

FOR_CLIENTS = {"REPARAM_URL"}


def main() -> None:
    try:
        settings = CliApp.run(Settings)
    except (ValidationError, SettingsError) as error:
        sys.exit(_explain(error))
    try:
        workers = device_of(settings).workers
    except DeviceError as error:
        sys.exit(str(error))
    logging.config.dictConfig(log_config(settings))
    if unknown := _unknown_in_the_environment():
        log.warning(
            "no settings, and ignored: `python -m service --help` lists those there are", extra={"names": unknown}
        )
    sys.exit(run(settings, workers))


def _unknown_in_the_environment() -> list[str]:
    """What looks like a setting. Not refused: Kubernetes and Docker have variables of their own for a service that is
    called reparam."""
    known = {f"REPARAM_{name.upper()}" for name in Settings.model_fields} | FOR_CLIENTS
    return sorted(name for name in os.environ if name.upper().startswith("REPARAM_") and name.upper() not in known)


def _explain(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return f"{error}\n`python -m service --help` lists every setting"
    lines = []
    for item in error.errors():
        name = "_".join(str(part) for part in item["loc"])
        shown = "(secret)" if name == "api_key" else repr(item["input"])
        lines.append(
            f"--{name.replace('_', '-')} or REPARAM_{name.upper()}={shown}: {item['msg'].removeprefix('Value error, ')}"
        )
    return "\n".join([*lines, "`python -m service --help` lists every setting"])


if __name__ == "__main__":
    main()
