"""HTTP headers in the three forms they have here: ASGI's list, lines as they are sent, and a map to look them up."""

Headers = list[tuple[bytes, bytes]]  # as ASGI has them
HeaderMap = dict[bytes, bytes]  # of a request, names in small letters


def by_name(headers: Headers) -> HeaderMap:
    """Several of one name are one list (RFC 9110, 5.3)."""
    given = dict(headers)
    if len(given) < len(headers):
        lists: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            lists.setdefault(name, []).append(value)
        given = {name: b", ".join(values) for name, values in lists.items()}
    return given


def to_lines(headers: Headers) -> bytes:
    """Raises ValueError for a header that would begin another line."""
    joined = b"".join([b"%b: %b\r\n" % header for header in headers])
    if joined.count(b"\n") != len(headers) or joined.count(b"\r") != len(headers):
        raise ValueError(f"a header holds a line break: {headers}")
    return joined


def from_lines(lines: bytes) -> Headers:
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines.splitlines())]
