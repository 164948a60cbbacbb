"""Pictures from pixels: contact sheets, and PNG without an image library."""

import struct
import zlib
from math import ceil, isqrt

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

GAP = 2  # pixels between two images of a sheet
PAPER = 96  # grey level of the gaps
PNG_COLOUR = {1: 0, 3: 2}  # channels to PNG's colour types: grey, RGB


def sheet(images: Pixels, columns: int | None = None) -> Pixels:
    """Lay images out as a contact sheet, in the layout of the service.

    images: uint8 (n, C, H, W).
    columns: number of images in a row. Default: ceil(sqrt(n)), nearly a square.

    Returns: uint8 (C, height, width); a single image without a frame.
    """
    n, channels, height, width = images.shape
    if n == 1:
        return images.reshape(channels, height, width)
    columns = columns or isqrt(n - 1) + 1
    rows = ceil(n / columns)
    paper = np.full((channels, GAP + rows * (height + GAP), GAP + columns * (width + GAP)), PAPER, np.uint8)
    for index, image in enumerate(images):
        top, left = GAP + index // columns * (height + GAP), GAP + index % columns * (width + GAP)
        paper[:, top : top + height, left : left + width] = image
    return paper


def png(picture: Pixels) -> bytes:
    """Encode a picture as PNG (RFC 2083).

    picture: uint8 (C, height, width), C 1 or 3.

    Returns: the bytes of the PNG file.

    Raises: ValueError for another number of channels.
    """
    channels, height, width = picture.shape
    if channels not in PNG_COLOUR:
        raise ValueError(f"a PNG has 1 or 3 channels, the images have {channels}; save them as .npy")
    lines = picture.transpose(1, 2, 0).reshape(height, width * channels)
    unfiltered = np.pad(lines, ((0, 0), (1, 0)))  # each line begins with a filter number; 0 is no filter
    header = struct.pack(">IIBBBBB", width, height, 8, PNG_COLOUR[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
