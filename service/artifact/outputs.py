"""The table of outputs: every array available to requests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Output:
    """An array available to requests.

    name: name in requests and responses.
    dtype: dtype of the array in a response.
    source: name of the graph's output, the argument of `read`.
    read: maps the source, (n, ...), to a new array, (n, *row shape). The next batch overwrites the source.
    row_shape: maps the model's latent_shape and image_shape to the shape of a row.
    json_type: type of the JSON member, for OpenAPI.
    meaning: one sentence, for OpenAPI.
    is_picture: a row is uint8 (C, H, W). JSON carries such a row as a PNG in base64.
    """

    name: str
    dtype: npt.DTypeLike
    source: str
    read: Callable[[Array], Array]
    row_shape: Callable[[Shape, Shape], Shape]
    json_type: Any
    meaning: str
    is_picture: bool = False


OUTPUTS = {
    output.name: output
    for output in (
        Output(
            name="images",
            dtype=np.uint8,
            source="pixels",
            read=np.ndarray.copy,
            row_shape=lambda _, image: image,
            json_type=list[str],
            meaning="One base64 PNG a row.",
            is_picture=True,
        ),
        Output(
            name="latents",
            dtype=np.float32,
            source="latents",
            read=np.ndarray.copy,
            row_shape=lambda latent, _: latent,
            json_type=list[Any],
            meaning="(n, *latent_shape)",
        ),
        Output(
            name="codes",
            dtype=np.float32,
            source="codes",
            read=np.ndarray.copy,
            row_shape=lambda latent, _: latent,
            json_type=list[list[list[float]]],
            meaning="(n, D, K), one-hot or relaxed.",
        ),
        Output(
            name="indices",
            dtype=np.int32,
            source="codes",
            read=lambda codes: codes.argmax(-1).astype(np.int32),
            row_shape=lambda latent, _: latent[:-1],
            json_type=list[list[int]],
            meaning="(n, D), the category of each variable.",
        ),
    )
}

if TYPE_CHECKING:
    OutputName = str
else:
    OutputName = Literal[tuple(OUTPUTS)]  # computed, so that each name is written once, in the table
