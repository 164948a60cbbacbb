"""python -m service [--help]"""

import logging.config
import sys

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from service.devices import DeviceError
from service.life import device_of
from service.server import log_config, serve
from service.settings import Settings
from service.workers import supervise


def main() -> None:
    try:
        settings = CliApp.run(Settings)
    except (ValidationError, SettingsError) as error:
        sys.exit(_explain(error))
    try:
        device = device_of(settings)
        if device.workers == 1:
            serve(settings)
        else:
            logging.config.dictConfig(log_config(settings))
            sys.exit(supervise(settings, device.workers))
    except DeviceError as error:
        sys.exit(str(error))


def _explain(error: ValidationError | SettingsError) -> str:
    if isinstance(error, SettingsError):
        return f"{error}\n`python -m service --help` lists every setting"
    lines = []
    for item in error.errors():
        name = "_".join(str(part) for part in item["loc"])
        shown = "(secret)" if name == "api_key" else repr(item["input"])
        lines.append(f"REPARAM_{name.upper()}={shown}: {item['msg']}")
    return "\n".join([*lines, "`python -m service --help` lists every setting"])


if __name__ == "__main__":
    main()
