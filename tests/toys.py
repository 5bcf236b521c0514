"""A data set, a model and an observer that are small enough to train in a moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mdeq import Broyden, ClassificationHeadConfig, Gmres, Implicit, MDEQConfig, Network
from mdeq.saved import Architecture
from pipeline.data.loading import Keys, draw
from pipeline.train.loop import Row

ARCHITECTURE = Architecture(
    MDEQConfig(channels=(8, 8), expansion=2, groups=4, dropout=0.3),
    ClassificationHeadConfig((4, 4), 16),
    2,
    Broyden(steps=4),
    Implicit(Gmres(steps=3)),
)


class Stripes:
    """8 x 8 images whose class is the direction of their stripes; each epoch has other noise."""

    classes = 2
    names = ("across", "down")

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"stripes {index}"

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        images = torch.zeros(len(keys.indices), 3, 8, 8)
        targets = torch.tensor(keys.indices) % 2
        for image, target, index in zip(images, targets, keys.indices, strict=True):
            noise = draw(0, keys.epoch, index).normal(0, 0.3, (3, 8, 8))
            image += torch.from_numpy(noise).float()
            (image if target else image.transpose(1, 2))[:, ::2] += 1
        return images, targets


def network() -> Network:
    torch.manual_seed(0)
    built = ARCHITECTURE.build()
    assert isinstance(built, Network)
    return built


class Watcher:
    """Keeps the rows and counts the steps; `stop` interrupts after that step, as a kill would."""

    def __init__(self, stop: int | None = None) -> None:
        self.rows: list[tuple[int, Row]] = []
        self.steps: list[int] = []
        self.stop = stop

    def step(self, step: int, total: int, values: Row) -> None:
        self.steps.append(step)
        if step == self.stop:
            raise Killed

    def validating(self, batches: Iterable[Any]) -> Iterable[Any]:
        return batches

    def record(self, step: int, row: Row) -> None:
        self.rows.append((step, dict(row)))


class Killed(Exception):
    """Ends a training as a kill does: nothing is saved any more."""


def untimed(row: Row) -> Row:
    """A row without what the clock decides."""
    return {k: v for k, v in row.items() if "time/" not in k and "memory/" not in k}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
