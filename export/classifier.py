"""A small classifier, whose features measure sample quality. Features of Inception are made for photographs."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from reparam.export.data import load, load_labels
from reparam.export.draws import CLASSIFIER, generator
from reparam.export.errors import DataError, RunError
from reparam.export.files import READ_ERRORS, read_tensors, write_tensors
from reparam.export.objectives import cosine_decay
from reparam.models import VAEConfig
from reparam.models.bodies import encoder

FILE = "classifier.safetensors"
WIDTH, FEATURES = (32, 64), 64
BATCH = 128
INFERENCE_BATCH = 1000  # images per call without gradients
LEARNING_RATE = 2e-3


class Classifier:
    """Two convolutions, a layer of features and a layer of classes.

    image_shape: (C, H, W).
    classes: number of classes.
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        config = VAEConfig(image_shape, (classes,), "conv", WIDTH, dense=(FEATURES,))
        self.image_shape = image_shape
        self.network: nn.Sequential = encoder(config, classes)

    def logits(self, pixels: Tensor) -> Tensor:
        """Compute class logits: uint8 (n, C, H, W) -> float32 (n, classes)."""
        return self.network(pixels.float() / 255)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """Compute the inputs of the last layer: uint8 (n, C, H, W) -> float32 (n, FEATURES), at least 0."""
        return torch.cat([self.network[:-1](part.float() / 255) for part in pixels.split(INFERENCE_BATCH)])

    @classmethod
    def load(cls, folder: Path) -> "Classifier":
        """Read a trained classifier from a folder.

        Raises: RunError if the folder holds no classifier or a damaged file.
        """
        try:
            tensors, metadata = read_tensors(folder / FILE)
            about = json.loads(metadata["about"])
            classifier = cls(tuple(about["image_shape"]), about["classes"])
            classifier.network.load_state_dict(tensors)
        except READ_ERRORS as error:
            raise RunError(f"{folder} holds no classifier ({error}): `reparam classifier` trains one") from error
        return classifier


def train_classifier(source: str, out: Path, *, epochs: int, seed: int) -> float:
    """Train a classifier on images with labels, by Adam with cosine decay, and write the classifier to a folder.

    source: `digits`, or a folder of IDX files with labels.
    out: folder of the classifier; made if missing.
    epochs: passes over the training images.
    seed: seed of the initial weights and of the order of images.

    Returns: accuracy on the held-out images, 0 .. 1.

    Raises: DataError; RunError if the folder already holds a classifier.
    """
    if (out / FILE).exists():
        raise RunError(f"{out} already holds a classifier: choose another --out, or remove the folder")
    data, (labels, held_out_labels) = load(source), load_labels(source)
    for one, other in ((labels, data.train), (held_out_labels, data.test)):
        if len(one) != len(other):
            raise DataError(f"{source} has {len(one)} labels for {len(other)} images")
    pixels, targets = torch.from_numpy(data.train.copy()), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(data.image_shape, int(labels.max()) + 1)
    optimizer = torch.optim.Adam(classifier.network.parameters(), lr=LEARNING_RATE, fused=True)
    orders = (torch.randperm(len(pixels), generator=generator(seed, CLASSIFIER, epoch)) for epoch in range(epochs))
    batches = [rows for order in orders for rows in order.split(BATCH)]
    for step, rows in enumerate(tqdm(batches, desc="classifier", leave=False, disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine_decay(step, len(batches))
        loss = cross_entropy(classifier.logits(pixels[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        held_out = torch.from_numpy(data.test.copy()).split(INFERENCE_BATCH)
        found = torch.cat([classifier.logits(part).argmax(1) for part in held_out])
    accuracy = (found == torch.from_numpy(held_out_labels)).double().mean().item()
    about = {"image_shape": data.image_shape, "classes": int(labels.max()) + 1, "data": data.name, "accuracy": accuracy}
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / FILE, classifier.network.state_dict(), about=json.dumps(about))
    return accuracy
