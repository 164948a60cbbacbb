"""Choice of the HTTP library: httpx2 if installed, else httpx. Objects of the two libraries cannot be mixed."""

try:
    import httpx2 as httpx
except ModuleNotFoundError:
    try:
        import httpx  # type: ignore[no-redef]  # both have the interface used here
    except ModuleNotFoundError as error:
        raise ImportError("reparam needs an HTTP library: pip install httpx", name="httpx") from error

__all__ = ["check_transport", "httpx"]

LIBRARIES = {"httpx", "httpx2"}


def check_transport(transport: object, base: type) -> None:
    """Check a transport that the user supplied.

    transport: None for the default transport.
    base: BaseTransport or AsyncBaseTransport of the library in use.

    Raises: TypeError for a transport of the other library, and for an asynchronous transport in place of a synchronous
        transport or the reverse.
    """
    if transport is None or isinstance(transport, base):
        return
    used = httpx.__name__
    modules = {cls.__module__.partition(".")[0] for cls in type(transport).__mro__}
    origin = "".join(f" of {library}" for library in modules & LIBRARIES)
    raise TypeError(
        f"transport must be an {used}.{base.__name__}, got {type(transport).__name__}{origin}: "
        f"reparam uses {used} here, so make the transport with {used} too"
    )
