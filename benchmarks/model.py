"""The decoder of every server: a Gaussian VAE, MLP 20-400-784, made by the commands of a user."""

import subprocess
import sys
from pathlib import Path

import numpy as np


def model(root: Path, scratch: Path) -> Path:
    """Path of model.onnx, the only artifact below `scratch`. Trains and publishes the model if missing."""
    path = scratch / "artifacts" / "decoder" / "1" / "model.onnx"
    if not path.exists():
        images, run = scratch / "images.npz", scratch / "run"
        scratch.mkdir(exist_ok=True)
        np.savez(images, images=np.random.default_rng(0).integers(0, 256, (640, 28, 28), np.uint8))
        shape = ["--body", "mlp", "--width", "400", "--latent-shape", "20"]
        _export(root, "train", "gaussian", "--data", images, *shape, "--epochs", "1", "--out", run)
        _export(root, "evaluate", run, "--samples", "1")
        _export(root, "publish", run, "--name", "decoder", "--artifacts", scratch / "artifacts")
    return path


def _export(root: Path, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "reparam", *arguments], cwd=root, check=True)
