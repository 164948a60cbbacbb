"""Log lines: JSON for machines, or text for people with REPARAM_LOG_FORMAT=text."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import orjson

from reparam.service.settings import Settings


def log_config(settings: Settings) -> dict[str, Any]:
    """Make the configuration of `logging`: lines on stderr, in the format of the settings, for all loggers.

    Returns: the argument of logging.config.dictConfig.
    """
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
    """Formats a log line as `time level message key=value ...`."""

    def __init__(self) -> None:
        super().__init__("{asctime} {levelname:<7} {message}", style="{")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        extras = (f" {key}={_plain(value)}" for key, value in vars(record).items() if key not in _STANDARD)
        return super().formatMessage(record) + "".join(extras)


def _plain(value: object) -> str:
    """Quote the value if a reader could mistake the value for several values, or a terminal for a command."""
    text = str(value)
    return text if text.isprintable() and " " not in text and "=" not in text else ascii(text)


PIPE_BUF = 4096  # largest atomic write to a pipe on Linux, in bytes; other systems have a single worker
MAX_PATH = 512  # characters; longer paths are cut, because clients choose the path


# A finished request: end of the response in seconds since the epoch, method, path in the request, route (the path as
# declared by the application), status, request id in printable ASCII, and seconds from the start of the request to the
# end of the response. A plain tuple, because one is made for each request.
RequestNote = tuple[float, str, str, str, int, bytes, float]


class AccessLog:
    """Writes one line per request to stderr.

    `logging` does not write these lines, because `logging` takes longer for a line than the service for a sample.

    enabled: the level of the logger LOGGER is info or lower.
    """

    LOGGER = "reparam.service.access"

    def __init__(self, format: Literal["json", "text"]) -> None:
        self.enabled = logging.getLogger(self.LOGGER).isEnabledFor(logging.INFO)
        self._line = _json_line if format == "json" else _text_line

    def write(self, entries: Iterable[RequestNote]) -> None:
        """Write the lines in pieces of at most PIPE_BUF bytes, because other workers write to the same pipe."""
        if not self.enabled:
            return
        lines: list[bytes] = []
        size = 0
        for entry in entries:
            line = self._line(entry)
            size += len(line)
            if size > PIPE_BUF:
                _write(lines)
                lines, size = [], len(line)
            lines.append(line)
        _write(lines)


def _write(lines: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # a log that cannot be written must not fail requests
        sys.stderr.buffer.write(b"".join(lines))
        sys.stderr.buffer.flush()


def _json_line(note: RequestNote) -> bytes:
    ended, method, path, _, status, request_id, seconds = note
    return b'{"time":"%b",%b,"request_id":%b,"seconds":%b}\n' % (
        _time(ended),
        _json_request(method, path[:MAX_PATH], status),
        orjson.dumps(request_id.decode()),
        orjson.dumps(round(seconds, 6)),
    )


@lru_cache(256)
def _json_request(method: str, path: str, status: int) -> bytes:
    """Write the members of a line that most requests share."""
    shared = {
        "level": "INFO",
        "logger": AccessLog.LOGGER,
        "message": "request",
        "method": method,
        "path": path,
        "status": status,
    }
    return orjson.dumps(shared)[1:-1]


def _text_line(note: RequestNote) -> bytes:
    ended, method, path, _, status, request_id, seconds = note
    return (
        f"{_time(ended).decode()} INFO    request method={method} path={_plain(path[:MAX_PATH])} status={status} "
        f"request_id={_plain(request_id.decode())} seconds={round(seconds, 6)}\n"
    ).encode()


def _time(when: float) -> bytes:
    """Format seconds since the epoch as `logging` does."""
    return b"%b,%03d" % (_second(int(when)), int(when % 1 * 1000))


@lru_cache(2)
def _second(when: int) -> bytes:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)).encode()
