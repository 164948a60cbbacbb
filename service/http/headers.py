"""HTTP headers in three forms: ASGI's list, the block of lines that is sent, and a map to look them up."""

Headers = list[tuple[bytes, bytes]]  # ASGI's; names in lower case
HeaderMap = dict[bytes, bytes]  # of a request; names in lower case


def by_name(headers: Headers) -> HeaderMap:
    """Map names to values. Several headers of one name are one list (RFC 9110, section 5.3)."""
    found = dict(headers)
    if len(found) < len(headers):
        lists: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            lists.setdefault(name, []).append(value)
        found = {name: b", ".join(values) for name, values in lists.items()}
    return found


def to_lines(headers: Headers) -> bytes:
    """Write headers as lines. Raises ValueError for a header that holds a line break."""
    joined = b"".join([b"%b: %b\r\n" % header for header in headers])
    if joined.count(b"\n") != len(headers) or joined.count(b"\r") != len(headers):
        raise ValueError(f"a header holds a line break: {headers}")
    return joined


def from_lines(lines: bytes) -> Headers:
    """Read headers from lines that `to_lines` could have written."""
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines.splitlines())]


def content_length(headers: HeaderMap) -> int:
    """Read the length of a body in bytes; 0 where the head does not say."""
    length = headers.get(b"content-length", b"")
    return int(length) if length.isdigit() else 0
