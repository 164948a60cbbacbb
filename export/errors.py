"""Errors that a user of `reparam train`, `publish` and the other commands can fix. Each message says how."""


class ExportError(Exception):
    """Base class of the errors below."""

    pass


class DataError(ExportError):
    """The data cannot be used. The message names the file."""


class RunError(ExportError):
    """The run cannot be started, resumed or read."""


class GateError(ExportError):
    """The artifact must not be published. The message says which value differs, by how much, and where."""
