"""Order and randomness of training data as functions of (seed, epoch, index) alone.

Nothing here keeps a random state: a run resumed inside an epoch, with other workers or more
processes, sees the very same samples with the very same augmentation. Torch and NumPy alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.errors import UserError, escaped
from pipeline.sets import DataSet


@dataclass(frozen=True)
class Share:
    """The part of each batch that is read here: `pieces` micro-batches of process `rank`."""

    rank: int = 0
    processes: int = 1
    pieces: int = 1

    def bounds(self, samples: int) -> list[tuple[int, int]]:
        """First and last + 1 of each piece, of a batch of `samples`; a piece may be empty."""
        parts, first = self.processes * self.pieces, self.rank * self.pieces
        pieces = range(first, first + self.pieces)
        return [(samples * piece // parts, samples * (piece + 1) // parts) for piece in pieces]


@dataclass(frozen=True)
class Keys:
    """The samples of one batch: positions in the data set, and the epoch, which seeds them."""

    epoch: int
    indices: list[int]


class BatchDataset(Protocol):
    """A data set read by whole batches."""

    classes: int
    names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), normalised float32, and their targets (B,) or (B, H, W), int64."""
        ...

    def name(self, index: int) -> str:
        """Which file or image a sample is, for messages."""
        ...


class Samples(Protocol):
    """A split that is read sample by sample."""

    names: tuple[str, ...]  # of the classes
    paths: Sequence[str | bytes]  # or another name of each image

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An image (H, W, 3) uint8 and its target () or (H, W); `rng` draws what is random."""
        ...


def draw(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one sample in one epoch."""
    return np.random.default_rng((seed, epoch, index))


def order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The samples of a training epoch in their order."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def spread(length: int, limit: int | None) -> np.ndarray:
    """`limit` positions among `length`, spread evenly over all classes of a sorted set."""
    count = length if limit is None else min(limit, length)
    return np.arange(count) * length // count


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels (B, 3, H, W) uint8, as float32 in 0..1, minus `mean`, divided by `std` per channel."""
    shift, scale = (pixels.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
    return ((pixels.float() / 255 - shift) / scale).contiguous()


class Chosen:
    """A `BatchDataset` of `limit` samples of a split, spread evenly; None for all.

    Attributes:
        frames: Of Cityscapes: the path, width and height of each photo.
    """

    def __init__(
        self, samples: Samples, facts: DataSet, limit: int | None = None, seed: int = 0
    ) -> None:
        self.samples, self.facts, self.seed = samples, facts, seed
        self.names, self.classes = samples.names, len(samples.names)
        self.chosen = spread(len(samples.paths), limit)
        frames: Sequence[tuple[str, int, int]] = getattr(samples, "frames", ())
        self.frames = tuple(frames[i] for i in self.chosen) if frames else ()

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.chosen)

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """The batch of `keys`, normalised, augmented as (seed, epoch, index) say."""
        pairs = []
        for index in keys.indices:
            rng = draw(self.seed, keys.epoch, index)
            pairs.append(self.samples.sample(self.chosen[index], rng))
        images, targets = zip(*pairs, strict=True)
        sizes = sorted({image.shape[:2] for image in images})
        if len(sizes) > 1:
            listed = ", ".join(f"{height} x {width}" for height, width in sizes)
            raise UserError(
                f"{escaped(self.name(keys.indices[0]))}: in a batch with pictures of several sizes "
                f"({listed}); set test_size or a batch of 1"
            )
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        labels = torch.from_numpy(np.stack(targets).astype(np.int64))
        return normalised(pixels, self.facts.mean, self.facts.std), labels

    def name(self, index: int) -> str:
        """An image's path in the data root."""
        return os.fsdecode(self.samples.paths[self.chosen[index]])


def batches(
    dataset: BatchDataset,
    batch: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool,
    start: int = 0,
    share: Share = Share(),
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """An iterator over one epoch of `dataset`, beginning at batch number `start`.

    An empty piece holds one sample of its batch, so that every process has as many batches;
    training gives it no weight.

    Args:
        dataset: What is read.
        batch: Samples per batch, over all processes.
        seed: Of order and augmentation.
        epoch: Seeds them, too.
        shuffle: Draw the order anew each epoch (training), or keep the manifest's (evaluation).
        start: The first batch, of a run that is resumed inside an epoch.
        share: Which pieces of each batch are read here.
        workers: Processes that prepare batches; changes nothing but the speed.
    """
    samples = order(len(dataset), seed, epoch) if shuffle else np.arange(len(dataset))
    pieces = []
    for first in range(start * batch, len(samples), batch):
        whole = samples[first : first + batch]
        for low, high in share.bounds(len(whole)):
            piece = whole[low:high] if low < high else whole[:1]
            pieces.append(Keys(epoch, piece.tolist()))
    pin = workers > 0 and torch.cuda.is_available()
    return DataLoader(dataset, batch_size=None, sampler=pieces, num_workers=workers, pin_memory=pin)  # type: ignore[arg-type]
