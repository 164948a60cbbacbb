"""Training speed of recipes, compared with a plain loop around the same network: python -m benchmarks training"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.options import Options
from benchmarks.report import Report, ratio

RECIPES = {  # kind of images, and latents per image; from 2 latents on the importance-weighted bound
    "kingma-gaussian": ("grey", 1),
    "jang-categorical": ("binary", 1),
    "iwae-50": ("grey", 50),
    "gaussian-best": ("grey", 1),
}
IMAGES, HELD_OUT = 12_000, 500
# Workers of the plain loop's DataLoader, and threads (0: one per core); the best speed counts.
SETTINGS = ((0, 0), (2, 0), (1, 1))
FROM_THE_START = {"elbo-epochs": 0, "kl-warm-up": 0, "prior-components": 1}
WARM = 1  # epochs before the measured epoch


def measure(options: Options) -> Report:
    """Images per second of the second epoch of a fresh process, ours and the plain loop in turn."""
    ours: dict[str, list[float]] = {name: [] for name in RECIPES}
    plain: dict[str, list[float]] = {name: [] for name in RECIPES}
    with TemporaryDirectory() as folder:
        _write_images(Path(folder))
        for turn in range(options.rounds):
            for name, (kind, samples) in RECIPES.items():
                data = Path(folder) / f"{kind}.npz"
                ours[name].append(_ours(name, data, samples, Path(folder) / f"{name}-{turn}"))
                plain[name].append(max(_plain(name, data, samples, *setting) for setting in SETTINGS))
    results = {
        name: {"ours": median(ours[name]), "plain": median(plain[name]), "ratios": _ratios(ours[name], plain[name])}
        for name in RECIPES
    }
    return Report(
        title="Training on this machine: images per second",
        columns=["recipe", "ours", "plain loop", "ratio"],
        rows=[
            [
                name,
                f"{median(ours[name]):.0f}",
                f"{median(plain[name]):.0f}",
                ratio(median(ours[name]), median(plain[name])),
            ]
            for name in RECIPES
        ],
        results={"images_per_second": results},
        notes=[
            f"Noise of the size of MNIST, grey or (jang-categorical) binary, {IMAGES} images, the ELBO by one sample "
            "(iwae-50: the importance-weighted bound by 50); "
            "the plain loop: a DataLoader over pictures (0 or 2 workers, or 1 worker and 1 thread: the best counts), "
            "Adam with default settings, the loss read in every step"
        ],
    )


def _write_images(folder: Path) -> None:
    random, shape = np.random.default_rng(0), (IMAGES + HELD_OUT, 28, 28)
    drawn = random.random(shape) < 0.2
    for name, greys in (("grey", random.integers(0, 256, shape)), ("binary", 255)):
        images = (drawn * greys).astype(np.uint8)
        np.savez(folder / f"{name}.npz", train=images[:IMAGES], test=images[IMAGES:])


def _ours(recipe: str, data: Path, samples: int, out: Path) -> float:
    options = ["--recipe", recipe, "--data", str(data), "--out", str(out), "--epochs", str(WARM + 1)]
    objective = {"objective": "elbo", "samples": 1} if samples == 1 else {}
    settings = [f"--{name}={value}" for name, value in (FROM_THE_START | objective).items()]
    _run("reparam", "train", *options, *settings, "--device", "cpu")
    *_, last = (out / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(last)["images_per_second"])


def _plain(recipe: str, data: Path, samples: int, workers: int, threads: int) -> float:
    return float(_run("benchmarks.peers.plain_training", recipe, *map(str, (data, samples, workers, threads))))


def _run(*arguments: str) -> str:
    return subprocess.run([sys.executable, "-m", *arguments], check=True, capture_output=True, text=True).stdout


def _ratios(ours: list[float], plain: list[float]) -> list[float]:
    return [round(one / other, 2) for one, other in zip(ours, plain, strict=True)]
