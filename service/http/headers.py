"""HTTP headers in three forms: the list of ASGI, the lines sent to the client, and a map for look-ups by name."""

Headers = list[tuple[bytes, bytes]]  # name and value, as in ASGI; names in lower case
MAX_DIGITS = 20  # of a length that are read; int() refuses thousands of digits
HeaderMap = dict[bytes, bytes]  # name to value, of a request; names in lower case


def by_name(headers: Headers) -> HeaderMap:
    """Map names to values. Values of headers with equal names are joined by commas (RFC 9110, section 5.3)."""
    found = dict(headers)
    if len(found) < len(headers):
        lists: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            lists.setdefault(name, []).append(value)
        found = {name: b", ".join(values) for name, values in lists.items()}
    return found


def to_lines(headers: Headers) -> bytes:
    """Write headers as lines, each with a line end.

    Raises: ValueError for a header with a line break.
    """
    joined = b"".join([b"%b: %b\r\n" % header for header in headers])
    if joined.count(b"\n") != len(headers) or joined.count(b"\r") != len(headers):
        raise ValueError(f"a header holds a line break: {headers}")
    return joined


def from_lines(lines: bytes) -> Headers:
    """Split lines into headers, the reverse of `to_lines`."""
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines.splitlines())]


def content_length(headers: HeaderMap) -> int:
    """Read Content-Length in bytes; 0 if the header is missing or not a number."""
    length = headers.get(b"content-length", b"")
    return int(length.lstrip(b"0")[:MAX_DIGITS] or b"0") if length.isdigit() else 0
