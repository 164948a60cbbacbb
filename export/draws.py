"""Reproducible random draws. Seed, purpose, epoch and part of the batch decide each draw, so a resumed run continues
exactly.
"""

import numpy as np
import torch
from torch import Tensor

# Purposes of a generator.
TRAINING, HELD_OUT, SHEET, EVALUATION, PRIOR, CLASSIFIER, QUALITY, ORDER = range(8)


def generator(
    seed: int, purpose: int, epoch: int = 0, share: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Make a torch generator, seeded by all arguments except the device.

    seed: seed of the user.
    purpose: one of the constants above.
    epoch: number of the epoch; in an evaluation, number of the batch.
    share: number of the part of a batch that is computed alone, 0 .. TrainConfig.shares - 1.
    device: device of the generator. Draws differ between devices.
    """
    (state,) = np.random.SeedSequence([seed, purpose, epoch, share]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state) >> 1)


def as_images(pixels: Tensor, binarize: bool, draws: torch.Generator) -> Tensor:
    """Convert pixels to images, binarized at random if `binarize`.

    pixels: uint8, any shape.
    binarize: draw each pixel as 1 with probability pixel / 255; otherwise divide by 255.
    draws: generator of the binarization, on the device of the pixels.

    Returns: float32 in [0, 1], of the same shape.
    """
    if not binarize:
        return pixels.float() / 255
    if pixels.is_cuda:
        thresholds = torch.empty_like(pixels).random_(0, 255, generator=draws)  # 0 .. 254
        return (thresholds < pixels).float()
    # Use the 8 bytes of each random int64 as thresholds, and redraw the value 255, so that 0 .. 254 is uniform: nine
    # times as fast as torch.bernoulli.
    words = torch.empty(-(-pixels.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=draws)
    thresholds = words.view(torch.uint8)[: pixels.numel()]
    too_high = torch.from_numpy(np.flatnonzero(thresholds.numpy() == 255))  # three times as fast as torch's nonzero
    thresholds[too_high] = torch.empty(len(too_high), dtype=torch.uint8).random_(0, 255, generator=draws)
    return (thresholds.view_as(pixels) < pixels).float()


def is_binary(pixels: Tensor) -> bool:
    """Return True if all uint8 pixels are 0 or 255: binarizing then changes nothing."""
    return bool(((pixels == 0) | (pixels == 255)).all())
