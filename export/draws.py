"""Draws that repeat themselves: seed, purpose and epoch decide them, so a resumed run goes on as it would have."""

import numpy as np
import torch
from torch import Tensor

# What a generator is for.
TRAINING, HELD_OUT, SHEET, EVALUATION, PRIOR, CLASSIFIER, QUALITY, ORDER = range(8)


def generator(
    seed: int, purpose: int, epoch: int = 0, share: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator whose draws depend on nothing else."""
    (state,) = np.random.SeedSequence([seed, purpose, epoch, share]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state) >> 1)


def as_images(pixels: Tensor, binarize: bool, draws: torch.Generator) -> Tensor:
    """uint8 pixels -> float32 images in [0, 1], each pixel drawn from its grey value if `binarize`."""
    if not binarize:
        return pixels.float() / 255
    if pixels.is_cuda:
        thresholds = torch.empty_like(pixels).random_(0, 255, generator=draws)  # 0 .. 254
        return (thresholds < pixels).float()
    # Eight bytes of each number that is drawn, and other ones for 255: a ninth of bernoulli's time.
    words = torch.empty(-(-pixels.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=draws)
    thresholds = words.view(torch.uint8)[: pixels.numel()]
    too_high = torch.from_numpy(np.flatnonzero(thresholds.numpy() == 255))  # in a third of torch's time
    thresholds[too_high] = torch.empty(len(too_high), dtype=torch.uint8).random_(0, 255, generator=draws)
    return (thresholds.view_as(pixels) < pixels).float()


def is_binary(pixels: Tensor) -> bool:
    """Whether these are black and white already: uint8 pixels 0 and 255, of which binarizing changes none."""
    return bool(((pixels == 0) | (pixels == 255)).all())
