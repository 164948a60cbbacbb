"""What a user of `export` can mend; each message says how."""


class ExportError(Exception):
    pass


class DataError(ExportError):
    """The data cannot be used; the message names the file."""


class RunError(ExportError):
    """The run cannot be started, continued or read."""


class GateError(ExportError):
    """The artifact must not be published; the message says what differs, by how much, and where."""
