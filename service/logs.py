"""Log lines for people; for machines REPARAM_LOG_FORMAT=json prints the same fields as JSON."""

import logging

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
