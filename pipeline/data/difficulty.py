"""How hard the generated sets are: simple classifiers beside a small trained network, as a table.

A set is a gift if pixels, colours or places alone tell the answer, and noise if a network cannot find it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data import cifar10, cityscapes, generated
from pipeline.data.manifest import DataError, Found, progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.machine import Machine

CIFAR_LINEAR_AT_MOST, CIFAR_NETWORK_AT_LEAST = 0.45, 0.85
SCENES_APART = 0.10
COLOUR_BITS = 4


@dataclass(frozen=True)
class Measured:
    """One line of the table; `required` says what must hold, `holds` whether it does."""

    model: str
    accuracy: float
    required: str
    holds: bool


def run(name: str, machine: Machine) -> None:
    """Draw the set `name` (cifar10 or cityscapes) at its default size, measure, and print the table."""
    import torch
    from rich.console import Console
    from rich.table import Table

    if machine.threads:
        torch.set_num_threads(machine.threads)
    torch.manual_seed(0)
    root = machine.root / "work" / "difficulty" / name
    match name:
        case "cifar10":
            generated.ensure(root, generated.GeneratedCifar10())
            lines, measure = of_cifar10(root, machine.device), "test accuracy"
        case "cityscapes":
            generated.ensure(root, generated.GeneratedCityscapes())
            lines, measure = of_cityscapes(root, machine.device), "pixel accuracy (val)"
        case _:
            raise DataError(f"{name}: difficulty is measured of cifar10 and cityscapes")
    table = Table(
        "model",
        measure,
        "required",
        "holds",
        title=f"Difficulty of the generated {name}",
        title_justify="left",
    )
    for line in lines:
        table.add_row(line.model, f"{line.accuracy:.1%}", line.required, "yes" if line.holds else "NO")
    Console().print(table)


# ---- CIFAR-10


def of_cifar10(root: Path, device: str = "cpu", epochs: int = 12) -> list[Measured]:
    """Return what a linear classifier and the narrow ResNet-18 reach on CIFAR-10's batches in `root`."""
    from torch import nn

    from mdeq.baselines import NarrowResNet18, ResNetConfig

    train, test = (_open_cifar10(root, split, augment=False) for split in ("train", "test"))
    linear = max(
        _classify(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), train, test, 10, 1e-3, decay, device)
        for decay in (1e-3, 1e-1, 1.0)
    )
    resnet = NarrowResNet18(ResNetConfig(), cifar10.Cifar10.classes)
    varied = _open_cifar10(root, "train", augment=True)
    network = _classify(resnet, varied, test, epochs, 3e-3, 1e-2, device)
    low, high = CIFAR_LINEAR_AT_MOST, CIFAR_NETWORK_AT_LEAST
    return [
        Measured("linear on the pixels (best of 3)", linear, f"under {low:.0%}", linear < low),
        Measured(f"ResNet-18, 170K, {epochs} epochs", network, f"over {high:.0%}", network > high),
    ]


def _open_cifar10(root: Path, split: str, augment: bool) -> cifar10.Cifar10:
    parts = [
        cifar10.images_and_labels((root / found.files[0]).read_bytes(), root / found.files[0])
        for found in cifar10.find(root)
        if found.split == split
    ]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return cifar10.Cifar10(images, labels, augment=augment, seed=0)


def _classify(
    network: nn.Module,
    train: cifar10.Cifar10,
    test: cifar10.Cifar10,
    epochs: int,
    rate: float,
    decay: float,
    device: str,
) -> float:
    """Train a classifier and return its accuracy on `test`."""
    import torch

    from pipeline.data.loading import batches

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(batches(train, 64, seed=0, epoch=number, shuffle=True))

    _fit(network, epoch, epochs, len(train) // 64 + 1, rate, decay, device)
    right = 0
    with torch.no_grad():
        for images, labels in batches(test, 250, seed=0, epoch=0, shuffle=False):
            right += int((_logits(network, images.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(test)


def _fit(
    network: nn.Module,
    epoch: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    epochs: int,
    steps: int,
    rate: float,
    decay: float,
    device: str,
) -> None:
    """Train with AdamW, the rate rising for a tenth of the way and falling to nothing."""
    import torch
    from torch.nn.functional import cross_entropy

    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=decay)
    total = epochs * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / total, (1 + math.cos(math.pi * step / total)) / 2)
    )
    for number in progress(range(epochs), "Training"):
        for images, targets in epoch(number):
            loss = cross_entropy(
                _logits(network, images.to(device)), targets.to(device), ignore_index=cityscapes.IGNORE
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    output = network(images)
    return getattr(output, "logits", output)


# ---- the scenes


def of_cityscapes(root: Path, device: str = "cpu", epochs: int = 30) -> list[Measured]:
    """Return what place, colour and a small convolutional network reach on the scenes in `root`."""
    found = cityscapes.find(root)
    train, val = (_scenes(root, found, split) for split in cityscapes.SPLITS)
    place, colour = _by_place(train, val), _by_colour(train, val)
    network = _segment(train, val, epochs, device)
    return [
        Measured("commonest class of each place", place, "10 points under", network - place >= SCENES_APART),
        Measured("commonest class of each colour", colour, "10 points under", network - colour >= SCENES_APART),
        Measured(f"small conv net, {epochs} epochs", network, "", True),
    ]


def _scenes(root: Path, found: list[Found], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, H, W, 3) and train ids (N, H, W) of a split."""
    pairs = [cityscapes.read_pair(root, one.files[0], one.files[1]) for one in found if one.split == split]
    images, labels = (np.stack(part) for part in zip(*pairs, strict=True))
    return images, labels


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    known = labels != cityscapes.IGNORE
    return float((predicted[known] == labels[known]).mean())


def _by_place(train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]) -> float:
    votes = np.stack([(train[1] == label).sum(0) for label in range(len(cityscapes.class_names()))])
    return _accuracy(np.broadcast_to(votes.argmax(0), val[1].shape), val[1])


def _by_colour(train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]) -> float:
    classes = len(cityscapes.class_names())
    known = train[1] != cityscapes.IGNORE
    votes = np.zeros((1 << 3 * COLOUR_BITS, classes), np.int64)
    np.add.at(votes, (_bin(train[0])[known], train[1][known]), 1)
    best = np.where(votes.sum(1) > 0, votes.argmax(1), votes.sum(0).argmax())
    return _accuracy(best[_bin(val[0])], val[1])


def _bin(images: np.ndarray) -> np.ndarray:
    """Return the number of each pixel's colour, 16 steps a channel."""
    r, g, b = np.moveaxis(images.astype(np.int64) >> (8 - COLOUR_BITS), -1, 0)
    return (r << 2 * COLOUR_BITS) | (g << COLOUR_BITS) | b


def _segment(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], epochs: int, device: str
) -> float:
    """Train the small network on whole scenes, mirrored at random, and return its pixel accuracy on `val`."""
    import torch

    images, labels = _tensors(*train)
    batch = 8

    def epoch(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(number))
        for i, keys in enumerate(order.split(batch)):
            flip = (-1,) if (number + i) % 2 else ()
            yield images[keys].flip(flip), labels[keys].flip(flip)

    network = _small_network(len(cityscapes.class_names()))
    _fit(network, epoch, epochs, math.ceil(len(images) / batch), 3e-3, 1e-2, device)
    with torch.no_grad():
        predicted = [network(part.to(device)).argmax(1).cpu().numpy() for part in _tensors(*val)[0].split(batch)]
    return _accuracy(np.concatenate(predicted), val[1])


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    import torch

    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 128 - 1
    return scaled.contiguous(), torch.from_numpy(labels).long()


def _small_network(classes: int) -> nn.Module:
    """Return a plain network: down to a quarter, a few dilated convolutions, up again."""
    from torch import nn

    def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, 24, 2), *block(24, 48, 2), *block(48, 64), *block(64, 64, dilation=2),
        *block(64, 64, dilation=4), *block(64, 64, dilation=8), *block(64, 64),
        nn.Conv2d(64, classes, 1), nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
    )  # fmt: skip
