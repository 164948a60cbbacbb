"""Log lines for people; for machines REPARAM_LOG_FORMAT=json prints the same fields as JSON."""

import asyncio
import logging
import sys
import time
from functools import lru_cache
from typing import Any, Literal

import orjson

from reparam.service.settings import Settings


def log_config(settings: Settings) -> dict[str, Any]:
    """Structured lines on stderr, for the service, uvicorn and warnings alike."""
    formatters = {
        "json": {
            "()": "pythonjsonlogger.orjson.OrjsonFormatter",
            "fmt": "{asctime}{levelname}{name}{message}",
            "style": "{",
            "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
            "reserved_attrs": [*_STANDARD],
        },
        "text": {"()": "reparam.service.telemetry.logs.TextFormatter"},
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"chosen": formatters[settings.log_format]},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
        "root": {"level": settings.log_level.upper(), "handlers": ["stderr"]},
    }


_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}


class TextFormatter(logging.Formatter):
    """time level message key=value ..."""

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname:<7} {message}", style="{")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        extras = (f" {key}={_plain(value)}" for key, value in vars(record).items() if key not in _STANDARD)
        return super().formatMessage(record) + "".join(extras)


def _plain(value: object) -> str:
    """The value, quoted if it could be taken for more than one or for a terminal's command."""
    text = str(value)
    return text if text.isprintable() and " " not in text and "=" not in text else ascii(text)


DELAY = 0.1  # seconds
WRITTEN_AS_A_WHOLE = 4096  # bytes, by Linux into a pipe; elsewhere there is one worker and nobody to write between
LONGEST_PATH = 512  # characters; the client chose them


class AccessLog:
    """One line a request. Those of a tenth of a second are written together, and not by `logging`, which takes longer
    for a line than the service for a sample."""

    LOGGER = "service.access"

    def __init__(self, format: Literal["json", "text"]) -> None:
        self.enabled = logging.getLogger(self.LOGGER).isEnabledFor(logging.INFO)
        self._line = _json_line if format == "json" else _text_line
        self._entries: list[Entry] = []

    def write(self, method: str, path: str, status: int, request_id: bytes, seconds: float) -> None:
        if not self._entries:
            asyncio.get_running_loop().call_later(DELAY, self.flush)
        self._entries.append((time.time(), method, path[:LONGEST_PATH], status, request_id, seconds))

    def flush(self) -> None:
        """No more at a time than a pipe takes as a whole, for other workers write to the same."""
        entries, self._entries = self._entries, []
        together = b""
        for entry in entries:
            line = self._line(*entry)
            if len(together) + len(line) > WRITTEN_AS_A_WHOLE:
                _write(together)
                together = b""
            together += line
        _write(together)


def _write(lines: bytes) -> None:
    sys.stderr.buffer.write(lines)
    sys.stderr.buffer.flush()


Entry = tuple[float, str, str, int, bytes, float]


def _json_line(when: float, method: str, path: str, status: int, request_id: bytes, seconds: float) -> bytes:
    line = {
        "time": _time(when),
        "level": "INFO",
        "logger": AccessLog.LOGGER,
        "message": "request",
        "method": method,
        "path": path,
        "status": status,
        "request_id": request_id.decode(),
        "seconds": round(seconds, 6),
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _text_line(when: float, method: str, path: str, status: int, request_id: bytes, seconds: float) -> bytes:
    return (
        f"{_time(when)} INFO    request method={method} path={_plain(path)} status={status} "
        f"request_id={_plain(request_id.decode())} seconds={round(seconds, 6)}\n"
    ).encode()


def _time(when: float) -> str:
    """As `logging` writes it."""
    return f"{_second(int(when))},{int(when % 1 * 1000):03d}"


@lru_cache(2)
def _second(when: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
