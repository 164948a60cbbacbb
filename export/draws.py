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
    thresholds = torch.empty_like(pixels).random_(0, 255, generator=draws)  # 0 .. 254: a third of bernoulli's time
    return (thresholds < pixels).float()
