"""How hard the generated sets are: simple classifiers beside a small trained network, as a table.

A set is a gift if pixels, colours or places alone tell the answer, and noise if a network cannot find it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mdeq import Prediction
from mdeq.baselines import NarrowResNet18, ResNetConfig
from pipeline import training
from pipeline.data import cifar10, cityscapes, generated
from pipeline.data.loading import Keys
from pipeline.data.manifest import DataError
from pipeline.machine import Machine
from pipeline.metrics import ConfusionMatrix
from pipeline.progress import Progress
from pipeline.recipe import Adam, Recipe
from pipeline.tracking import NullTracker
from pipeline.training import Task

CIFAR_LINEAR_AT_MOST, CIFAR_NETWORK_AT_LEAST = 45.0, 85.0
SCENES_APART = 10.0
COLOUR_BITS = 4


@dataclass(frozen=True)
class Measured:
    """One line of the table: an accuracy in per cent; `required` says what must hold, `holds` whether it does."""

    model: str
    accuracy: float
    required: str
    holds: bool


@dataclass
class Pictures:
    """A split in memory: images (N, H, W, 3) uint8 and classes (N,) or (N, H, W); mirrored every other epoch."""

    images: np.ndarray
    targets: np.ndarray
    classes: int
    mirror: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W), between -1 and 1, and classes."""
        images = torch.from_numpy(self.images[keys.indices]).permute(0, 3, 1, 2).float() / 128 - 1
        targets = torch.from_numpy(self.targets[keys.indices]).long()
        if self.mirror and keys.epoch % 2:
            return images.flip(-1), targets.flip(-1) if targets.ndim > 1 else targets
        return images.contiguous(), targets

    def name(self, index: int) -> str:
        """Return which image it is."""
        return f"image {index}"


class Plain(nn.Sequential):
    """Layers whose output is the prediction."""

    def forward(self, image: Tensor) -> Prediction:
        """Return logits (B, classes, ...) for images (B, 3, H, W)."""
        return Prediction(super().forward(image), None)


def run(name: str, machine: Machine) -> None:
    """Draw the set `name` (cifar10 or cityscapes) at its default size, measure, and print the table."""
    if machine.threads:
        torch.set_num_threads(machine.threads)
    torch.manual_seed(0)
    root = machine.root / "work" / "difficulty" / name
    match name:
        case "cifar10":
            generated.ensure(root, generated.GeneratedCifar10())
            lines = of_cifar10(root, machine.device)
        case "cityscapes":
            generated.ensure(root, generated.GeneratedCityscapes())
            lines = of_cityscapes(root, machine.device)
        case _:
            raise DataError(f"{name}: difficulty is measured of cifar10 and cityscapes")
    table = Table("model", "accuracy", "required", "holds", title=f"Difficulty of the generated {name}")
    for line in lines:
        table.add_row(line.model, f"{line.accuracy:.1f}%", line.required, "yes" if line.holds else "NO")
    Console().print(table)


def of_cifar10(root: Path, device: str = "cpu", epochs: int = 12) -> list[Measured]:
    """Return what a linear classifier and the narrow ResNet-18 reach on CIFAR-10's batches in `root`."""
    splits = []
    for split in ("train", "test"):
        files = [root / found.files[0] for found in cifar10.find(root) if found.split == split]
        parts = [cifar10.images_and_labels(file.read_bytes(), file) for file in files]
        images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        splits.append(Pictures(images.transpose(0, 2, 3, 1), labels, 10, mirror=split == "train"))
    train, test = splits
    linear = max(
        trained(Plain(nn.Flatten(), nn.Linear(3072, 10)), train, test, Recipe(Adam(1e-3, decay), 10, 64), device)
        for decay in (0.0, 1e-3, 1e-2)
    )
    network = trained(NarrowResNet18(ResNetConfig(), 10), train, test, Recipe(Adam(3e-3), epochs, 64), device)
    low, high = CIFAR_LINEAR_AT_MOST, CIFAR_NETWORK_AT_LEAST
    return [
        Measured("linear on the pixels (best of 3)", linear, f"under {low:.0f}%", linear < low),
        Measured(f"ResNet-18, 170K, {epochs} epochs", network, f"over {high:.0f}%", network > high),
    ]


def of_cityscapes(root: Path, device: str = "cpu", epochs: int = 30) -> list[Measured]:
    """Return what place, colour and a small convolutional network reach on the scenes in `root`."""
    splits, classes = [], len(cityscapes.class_names())
    for split in cityscapes.SPLITS:
        files = [found.files for found in cityscapes.find(root) if found.split == split]
        pairs = [cityscapes.read_pair(root, image, labels) for image, labels in files]
        images, labels = (np.stack(part) for part in zip(*pairs, strict=True))
        splits.append(Pictures(images, labels, classes, mirror=split == "train"))
    train, val = splits
    place, colour = by_place(train, val), by_colour(train, val)
    network = trained(_segmenter(classes), train, val, Recipe(Adam(3e-3), epochs, 8), device)
    return [
        Measured("commonest class of each place", place, "10 points under", network - place >= SCENES_APART),
        Measured("commonest class of each colour", colour, "10 points under", network - colour >= SCENES_APART),
        Measured(f"small conv net, {epochs} epochs", network, "", True),
    ]


def by_place(train: Pictures, test: Pictures) -> float:
    """Return the accuracy of answering the commonest class of each pixel's place."""
    votes = np.stack([(train.targets == label).sum(0) for label in range(train.classes)])
    return _accuracy(np.broadcast_to(votes.argmax(0), test.targets.shape), test)


def by_colour(train: Pictures, test: Pictures) -> float:
    """Return the accuracy of answering the commonest class of each pixel's colour, 16 steps a channel."""
    known = train.targets != cityscapes.IGNORE
    votes = np.zeros((1 << 3 * COLOUR_BITS, train.classes), np.int64)
    np.add.at(votes, (_bin(train.images)[known], train.targets[known]), 1)
    best = np.where(votes.sum(1) > 0, votes.argmax(1), votes.sum(0).argmax())
    return _accuracy(best[_bin(test.images)], test)


def _bin(images: np.ndarray) -> np.ndarray:
    r, g, b = np.moveaxis(images.astype(np.int64) >> (8 - COLOUR_BITS), -1, 0)
    return (r << 2 * COLOUR_BITS) | (g << COLOUR_BITS) | b


def _accuracy(predicted: np.ndarray, test: Pictures) -> float:
    known = test.targets != cityscapes.IGNORE
    return 100 * float((predicted[known] == test.targets[known]).mean())


class _Nowhere:
    """Keeps no state of a run."""

    def load(self) -> None: ...

    def save(self, content: dict[str, Any]) -> None: ...


def trained(network: nn.Module, train: Pictures, test: Pictures, recipe: Recipe, device: str) -> float:
    """Train and return the accuracy on `test`, per cent of the images or pixels."""
    loss = partial(cross_entropy, ignore_index=cityscapes.IGNORE)
    task = Task(train, test, loss, lambda: ConfusionMatrix(train.classes))
    with Progress("Training", NullTracker(), "") as progress:
        history = training.train(
            network, task, recipe, seed=0, device=device, workers=0, store=_Nowhere(), observer=progress
        )
    return history[-1]["eval/pixel_accuracy"]


def _segmenter(classes: int) -> Plain:
    """Return a plain network: down to a quarter, a few dilated convolutions, up again."""

    def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return Plain(
        *block(3, 24, 2), *block(24, 48, 2), *block(48, 64), *block(64, 64, dilation=2),
        *block(64, 64, dilation=4), *block(64, 64, dilation=8), *block(64, 64),
        nn.Conv2d(64, classes, 1), nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
    )  # fmt: skip
