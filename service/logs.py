"""Log lines for people; for machines REPARAM_LOG_FORMAT=json prints the same fields as JSON."""

import asyncio
import logging
import sys
import time
from typing import Literal

import orjson

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


class AccessLog:
    """One line a request. Those of a tenth of a second are written together, and not by `logging`, which takes longer
    for a line than the service for a sample."""

    LOGGER = "service.access"

    def __init__(self, format: Literal["json", "text"]) -> None:
        self.enabled = logging.getLogger(self.LOGGER).isEnabledFor(logging.INFO)
        self._line = _json_line if format == "json" else _text_line
        self._lines: list[bytes] = []
        self._second, self._stamp = 0, ""

    def write(self, method: str, path: str, status: int, request_id: str, seconds: float) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_later(DELAY, self.flush)
        self._lines.append(self._line(self._now(), method, path, status, request_id, round(seconds, 6)))

    def _now(self) -> str:
        """As `logging` writes it."""
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        return f"{self._stamp},{int(now % 1 * 1000):03d}"

    def flush(self) -> None:
        sys.stderr.buffer.write(b"".join(self._lines))
        sys.stderr.buffer.flush()
        self._lines.clear()


def _json_line(now: str, method: str, path: str, status: int, request_id: str, seconds: float) -> bytes:
    line = {
        "time": now,
        "level": "INFO",
        "logger": AccessLog.LOGGER,
        "message": "request",
        "method": method,
        "path": path,
        "status": status,
        "request_id": request_id,
        "seconds": seconds,
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _text_line(now: str, method: str, path: str, status: int, request_id: str, seconds: float) -> bytes:
    fields = f"method={method} path={_plain(path)} status={status} request_id={_plain(request_id)} seconds={seconds}"
    return f"{now} INFO    request {fields}\n".encode()
