"""python -m service [--help]"""

import asyncio
import logging
import logging.config
import os
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError
from pythonjsonlogger.core import RESERVED_ATTRS

from service.app import create_app
from service.devices import DeviceError
from service.life import Service
from service.protocol import Protocol
from service.settings import Settings

log = logging.getLogger("service")


def main() -> None:
    try:
        settings = CliApp.run(Settings)
    except (ValidationError, SettingsError) as error:
        sys.exit(_explain(error))
    logging.config.dictConfig(log_config(settings))
    try:
        app = create_app(settings)
    except DeviceError as error:
        sys.exit(str(error))
    server = Server(app, settings)
    server.run()
    if server.service.engine.busy:
        # A run cannot be interrupted, nor the interpreter taken down around it.
        logging.shutdown()
        os._exit(0)


class Server(uvicorn.Server):
    """uvicorn, with a way out in three steps: not ready, port closed, queue refused."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=Protocol,
                interface="asgi3",
                log_config=None,
                proxy_headers=False,
                access_log=False,  # the application logs each request itself
                server_header=False,
                timeout_graceful_shutdown=settings.drain_timeout + 1,  # the last resort
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM or SIGINT. Does not record the signal, so that the process ends with 0. A second one hurries."""
        loop = asyncio.get_running_loop() if self.started else None
        if loop is None or self.service.state == "draining":
            self.service.stop()
            self.should_exit = self.force_exit = True
            return
        settings = self.service.settings
        log.info("draining", extra={"signal": sig})
        self.service.drain()
        loop.call_later(settings.drain_delay, self._close)
        loop.call_later(settings.drain_delay + settings.drain_timeout, self.service.stop)

    def _close(self) -> None:
        self.should_exit = True


def log_config(settings: Settings) -> dict[str, Any]:
    """Structured lines on stderr, for the service, uvicorn and warnings alike."""
    formatters = {
        "json": {
            "()": "pythonjsonlogger.orjson.OrjsonFormatter",
            "fmt": "{asctime}{levelname}{name}{message}",
            "style": "{",
            "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
            "reserved_attrs": [*RESERVED_ATTRS, "color_message"],
        },
        "text": {"()": "service.logs.TextFormatter"},
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"chosen": formatters[settings.log_format]},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
        "root": {"level": settings.log_level.upper(), "handlers": ["stderr"]},
    }


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
