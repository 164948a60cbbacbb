"""Pictures from pixels: PNGs and contact sheets."""

import io
from math import ceil, isqrt

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

GAP = 2  # pixels between the images of a sheet
PAPER = 96  # grey level between the images of a sheet


def png(image: Pixels) -> bytes:
    """Encode an image as a PNG.

    image: uint8 (C, H, W), C 1 or 3.

    Returns: the bytes of the PNG file.
    """
    channels_last = image.transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(channels_last[..., 0] if len(image) == 1 else channels_last))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def sheet(images: Pixels, columns: int | None = None) -> Pixels:
    """Lay images out as a contact sheet.

    images: uint8 (n, C, H, W).
    columns: number of images in a row; default: ceil(sqrt(n)), nearly a square.

    Returns: uint8 (C, height, width); a single image without a frame.
    """
    n, channels, height, width = images.shape
    if n == 1:
        only: Pixels = images[0]
        return only
    columns = columns or isqrt(n - 1) + 1
    rows = ceil(n / columns)
    cells = np.full((rows * columns, channels, height + GAP, width + GAP), PAPER, np.uint8)
    cells[:n, :, :height, :width] = images
    tiled = cells.reshape(rows, columns, channels, height + GAP, width + GAP).transpose(2, 0, 3, 1, 4)
    paper = tiled.reshape(channels, rows * (height + GAP), columns * (width + GAP))[:, :-GAP, :-GAP]
    framed: Pixels = np.pad(paper, ((0, 0), (GAP, GAP), (GAP, GAP)), constant_values=PAPER)
    return framed
